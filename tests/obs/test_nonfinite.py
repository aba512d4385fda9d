"""What a step with a loss that is not finite leads to, by policy, and what a user reads."""

import logging

import pytest

from megam3.errors import TrainingError
from megam3.obs.nonfinite import NonfiniteWatch, RollBack

FIGURES = "rank 1: loss/total, loss/lexical"


def watch(policy, limit=2, checkpoints=()):
    return NonfiniteWatch(policy, limit, lambda: checkpoints, True)


@pytest.mark.parametrize("policy", ["stop", "skip", "rollback"])
def test_a_step_that_was_taken_is_nobodys_concern(policy):
    watch(policy).check(False, "", 7)


def test_stop_names_step_rank_figures_and_the_way_back():
    message = r"step 8, rank 1: loss/total, .* = 'not finite': .* before this step; lower optim.lr"
    with pytest.raises(TrainingError, match=message):
        watch("stop").check(True, FIGURES, 7)
    with pytest.raises(TrainingError, match="step 8, gradient norm = 'not finite'"):
        watch("stop").check(True, "", 7)
    with pytest.raises(TrainingError, match=r"go back with train.resume_step \(checkpoints: 3, 6\)"):
        watch("stop", checkpoints=[3, 6]).check(True, FIGURES, 7)


def test_skip_goes_on_until_too_many_in_a_row(caplog):
    health = watch("skip")
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            health.check(True, FIGURES, step)
    assert "step 3 skipped: rank 1: loss/total" in caplog.text
    health.check(False, "", 3)
    for step in (4, 5):
        health.check(True, "", step)
    with pytest.raises(
        TrainingError, match=r"3 steps in a row were not finite \(engine.max_skipped_steps = 2"
    ):
        health.check(True, "", 6)


def test_rollback_asks_for_it_with_step_and_figures():
    with pytest.raises(RollBack) as request:
        watch("rollback").check(True, FIGURES, 7)
    assert (request.value.step, request.value.what) == (7, FIGURES)
