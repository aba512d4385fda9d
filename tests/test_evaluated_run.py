"""Evaluations during a run: they change no bit of the training, name the checkpoint to keep, and end a run
that no longer gets better."""

import json
from pathlib import Path

import pytest

from megam3.checkpoint import list_steps
from megam3.checkpoint.evaluations import FILE
from tests.launches import Workplace, make_workplace, train_calls
from tests.ranks import run_ranks

EVERY_STEP = ["train.evaluate_every_steps=1", "data.num_workers=0"]
# weights that hardly move rank the same passages the same way: no evaluation is better than the first
STILL = ["optim.lr=1.0e-12", "train.steps=6", "train.early_stopping={patience: 2}"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def calls(place: Workplace) -> dict[str, dict]:
    """Calls in one process; results by name."""
    evaluated = [f"evaluation.folders=[{place.folder}/beir]", *EVERY_STEP]
    best = ["train.keep_best={metric: mrr@10}", "train.keep_checkpoints=1"]
    arguments = {
        "without": ["name=without", "train.steps=4", "data.num_workers=0"],
        "with": ["name=with", "train.steps=4", *evaluated],
        "best": ["name=best", "train.steps=4", *evaluated, *best],
        "still": ["name=still", *STILL, *evaluated],
        "still again": ["name=still", *STILL, *evaluated],
        "more patience": ["name=still", *STILL, *evaluated, "train.early_stopping={patience: 9}"],
        "blind": ["name=blind", *STILL],
    }
    named = [{"name": name, "arguments": [place.recipe, *given]} for name, given in arguments.items()]
    return run_ranks(train_calls, 1, named)[0]


@pytest.mark.ranks
def test_evaluations_change_no_bit_of_the_training(place: Workplace, calls: dict) -> None:
    assert [calls[name]["code"] for name in ("without", "with")] == [0, 0], calls["with"]["said"]
    assert place.figures("with") == place.figures("without")
    assert len(place.figures("with")) == 4


@pytest.mark.ranks
def test_the_best_checkpoint_stays_beside_the_last(place: Workplace, calls: dict) -> None:
    assert calls["best"]["code"] == 0, calls["best"]["said"]
    found = json.loads((place.run("best") / "checkpoints" / FILE).read_text())
    values = {int(step): figures["eval/beir/All/mrr@10"] for step, figures in found.items()}
    assert list(values) == [1, 2, 3, 4]
    # the last save comes before the last evaluation: the best one is looked for among the first three
    best = max((1, 2, 3), key=lambda step: (values[step], -step))
    assert set(list_steps(str(place.run("best")))) == {best, 4}


@pytest.mark.ranks
def test_a_run_that_does_not_get_better_ends_and_stays_ended(place: Workplace, calls: dict) -> None:
    assert [calls[name]["code"] for name in ("still", "still again", "more patience")] == [0, 0, 0]
    assert "step 3: ended early, All ndcg@10 has not got better for 2 evaluations" in calls["still"]["said"]
    assert "step 3: ended early" in calls["still again"]["said"]
    assert calls["still again"]["rows"] == []
    # another rule, another end: the run goes on from where it was
    assert len(calls["more patience"]["rows"]) == 3
    assert [row["step"] for row in place.rows("still")] == [1, 2, 3, 4, 5, 6]
    assert 3 in list_steps(str(place.run("still")))


@pytest.mark.ranks
def test_a_rule_about_evaluations_needs_some(calls: dict, tmp_path: Path) -> None:
    assert calls["blind"]["code"] == 2
    said = calls["blind"]["said"]
    assert "train.early_stopping" in said
    assert "set train.evaluate_every_steps and evaluation.folders, or leave it out" in said
