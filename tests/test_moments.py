"""What happens between two steps, with live objects that do nothing but take time."""

import types

import pytest

from megam3.batch import Progress
from megam3.checkpoint import Evaluations
from megam3.moments import Moments
from megam3.obs import clock as clock_module
from megam3.obs.clock import StepClock
from megam3.step import Wishes

SECONDS = {"write": 40.0, "finish": 7.0, "evaluate": 300.0}
"""What a checkpoint, the end of one in flight and an evaluation take by the pretended clock."""


class Nothing:
    """Any attribute is a call that does nothing."""

    def __getattr__(self, name):
        return lambda *given, **named: None


@pytest.fixture
def now(monkeypatch):
    time = [100.0]
    monkeypatch.setattr(clock_module, "time", types.SimpleNamespace(perf_counter=lambda: time[0]))
    return time


def make_moments(run_dir, now, clock):
    def lasts(what, answer=None):
        def call(*given, **named):
            now[0] += SECONDS[what]
            return answer

        return call

    train = types.SimpleNamespace(
        save_every_minutes=None,
        save_every_steps=1,
        evaluate_every_steps=1,
        log_every_steps=1,
        keep_best=None,
        early_stopping=None,
    )
    engine = types.SimpleNamespace(on_nonfinite="stop", max_skipped_steps=1)
    start = types.SimpleNamespace(progress=Progress(), skipped=(), overflows=0)
    run = types.SimpleNamespace(
        config=types.SimpleNamespace(train=train, engine=engine),
        run_dir=str(run_dir),
        total_steps=9,
        state=start,
        guard=Nothing(),
        evaluate=lasts("evaluate", {}),
    )
    writer = types.SimpleNamespace(save=lasts("write"), finish=lasts("finish"), is_pending=True)
    moments = Moments(run, writer, types.SimpleNamespace(add=lambda *given: None), clock)
    moments._state = lambda progress: None
    return moments


def test_tokens_per_second_know_neither_saving_nor_evaluating(tmp_path, now):
    clock = StepClock()
    moments = make_moments(tmp_path, now, clock)
    progress = Progress(step=1)
    with moments:
        clock.add(1000)
        now[0] += 2.0
        # a due checkpoint, which first ends the one in flight; then one whose files have arrived
        moments.save(progress, Wishes(), leaves=False, is_evaluated=False)
        moments._settings.save_every_steps = None
        moments.save(progress, Wishes(), leaves=False, is_evaluated=False)
        moments._evaluate(1)
    assert now[0] == 100.0 + 2.0 + SECONDS["write"] + 2 * SECONDS["finish"] + SECONDS["evaluate"]
    assert clock.read().tokens_per_second == 500.0


def test_files_of_an_earlier_run_are_no_evaluation_of_this_one(tmp_path, now):
    moments = make_moments(tmp_path, now, StepClock())
    moments._run.config.evaluation = types.SimpleNamespace(folders=["heldout"])
    (tmp_path / "eval").mkdir()
    # an earlier run in this folder was evaluated there; this one was killed before it was
    (tmp_path / "eval" / "step-000004-heldout.json").write_text("{}")
    moments._evaluations = Evaluations(str(tmp_path), 4)
    assert moments._owes_evaluation(4)
    moments._evaluations.add(4, {"eval/heldout/All/ndcg@10": 0.5})
    assert not moments._owes_evaluation(4)
