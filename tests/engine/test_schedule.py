import math

import pytest
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from megam3.engine.schedule import learning_rate_factor


def test_warm_up_rises_in_equal_steps_and_reaches_the_peak():
    factors = [learning_rate_factor(s, 100, 0.1, "linear") for s in range(10)]
    assert factors == pytest.approx([(s + 1) / 10 for s in range(10)])


def test_linear_decay_ends_one_step_above_zero():
    # the step after the last would be 0; the last itself still moves
    assert learning_rate_factor(99, 100, 0.1, "linear") == pytest.approx(1 / 90)
    assert learning_rate_factor(100, 100, 0.1, "linear") == 0.0


def test_cosine_equals_torch():
    optimizer = SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = CosineAnnealingLR(optimizer, T_max=50)
    for step in range(50):
        assert learning_rate_factor(step, 50, 0.0, "cosine") == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-12
        )
        optimizer.step()
        scheduler.step()


def test_constant_stays_after_warm_up():
    assert {learning_rate_factor(s, 10, 0.3, "constant") for s in range(3, 10)} == {1.0}


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_a_single_step_moves(shape):
    assert learning_rate_factor(0, 1, 0.1, shape) > 0
    assert math.isfinite(learning_rate_factor(5, 1, 1.0, shape))
