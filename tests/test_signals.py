"""Signals that find a run at something else than a step, and through DeepSpeed's runner: saved, the code that
says what comes next, and the run goes on as one that nothing happened to."""

import signal
from pathlib import Path

import pytest

from megam3.obs.stop import EXIT_REQUEUE, EXIT_STOPPED
from tests.launches import Workplace, launch, make_workplace
from tests.test_supervision import LONG, finish, ranks_below, start, still_running, wait_for_step

PHASES = {
    "store": ("megam3.build", "open_on_every_rank"),
    "evaluate": ("megam3.build", "evaluate"),
    "save": ("megam3.checkpoint.writer.CheckpointWriter", "save"),
}
"""(where, the function that the signal finds the run in)."""

SIGNAL_INSIDE = """
import os, pkgutil, signal
owner, done = pkgutil.resolve_name("{owner}"), []
original = owner.{name}
def interrupted(*arguments, **named):
    if not done:
        done.append(os.kill(os.getpid(), signal.SIG{sent}))
    return original(*arguments, **named)
owner.{name} = interrupted
import sys
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module")
def arguments(place: Workplace) -> list[str]:
    folders = f"evaluation.folders=[{place.folder}/beir]"
    return ["train.steps=8", "train.save_every_steps=2", "train.evaluate_every_steps=3", folders]


@pytest.fixture(scope="module")
def whole(place: Workplace, arguments: list[str]) -> list[dict]:
    """Figures of a run that nothing happens to."""
    code, said = finish(start(place, "whole", *arguments))
    assert code == 0, said
    return place.figures("whole")


@pytest.mark.parametrize(
    ("phase", "sent", "code"),
    [
        ("store", "TERM", EXIT_STOPPED),
        ("evaluate", "USR1", EXIT_REQUEUE),
        ("evaluate", "TERM", EXIT_STOPPED),
        ("save", "USR1", EXIT_REQUEUE),
    ],
)
def test_a_signal_in_any_phase_is_obeyed_after_the_step(
    place: Workplace, arguments: list[str], whole: list[dict], phase: str, sent: str, code: int
) -> None:
    name = f"{phase}-{sent}"
    owner, function = PHASES[phase]
    # `pkgutil.resolve_name` takes a class by `module:class`
    owner = owner if owner.rpartition(".")[2].islower() else ":".join(owner.rsplit(".", 1))
    program = SIGNAL_INSIDE.format(owner=owner, name=function, sent=sent)
    found, said = finish(start(place, name, *arguments, code=program))
    assert found == code, said
    stopped = len(place.rows(name))
    assert 1 <= stopped < 8
    assert f"stopped at step {stopped} of 8; newest checkpoint: step {stopped}" in said
    found, said = finish(start(place, name, *arguments))
    assert found == 0, said
    assert f"starting at step {stopped}" in said
    assert place.figures(name) == whole


@pytest.mark.ranks
def test_a_term_of_deepspeeds_runner_reaches_the_ranks(place: Workplace, tmp_path: Path) -> None:
    """The runner sends its launcher SIGINT and SIGTERM, the launcher its ranks SIGTERM: one request."""
    process = launch(place.recipe, "name=forwarded", *LONG)
    wait_for_step(place, "forwarded", 2, process)
    ranks = ranks_below(process)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=300)
    assert still_running(ranks) == []
    steps = len(place.rows("forwarded"))
    assert f"stopped at step {steps} of 100000; newest checkpoint: step {steps}" in said
    assert (place.run("forwarded") / "checkpoints" / "latest").read_text() == f"step-{steps:06d}"
