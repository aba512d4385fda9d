"""What happens after a loss or a gradient that is not finite: stop, skip the step, or go back. Pure: numbers
in, a message, an error or a request out. By then the engine has left weights and moments as they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Literal

from megam3.errors import TrainingError

logger = logging.getLogger(__name__)

Policy = Literal["stop", "skip", "rollback"]
"""engine.on_nonfinite."""


class RollBack(Exception):  # noqa: N818 - a request, no error
    """The run is to go back to its newest checkpoint and round the data since then. All ranks raise it at the
    same step."""

    def __init__(self, step: int, what: str):
        self.step, self.what = step, what
        """Steps done before the one that failed; rank and names of its figures."""
        super().__init__(f"step {step + 1}, {what}")


class NonfiniteWatch:
    """Acts on steps that were not taken; every rank has one, and they agree because their figures do.

    Args:
        policy: engine.on_nonfinite.
        max_skipped_steps: with "skip", the limit in a row.
        checkpoints: reads the steps a run can go back to, for messages.
        is_main: whether this rank is the one that says what all ranks know.
    """

    def __init__(
        self, policy: Policy, max_skipped_steps: int, checkpoints: Callable[[], Sequence[int]], is_main: bool
    ):
        self._policy, self._limit, self._checkpoints = policy, max_skipped_steps, checkpoints
        self._is_main, self._skipped = is_main, 0

    def check(self, is_skipped: bool, nonfinite: str, step: int) -> None:
        """Act on the step after `step` done ones.

        Args:
            is_skipped: no weight moved.
            nonfinite: rank and names of the figures that are not finite; empty: the gradient alone.

        Raises:
            TrainingError: the policy is to stop, or too many steps in a row were skipped; names step, rank,
                figures and the checkpoints there are.
            RollBack: the policy is to go back.
        """
        if not is_skipped:
            self._skipped = 0
            return
        what = nonfinite or "gradient norm"
        if self._policy == "rollback":
            raise RollBack(step, what)
        if self._policy == "stop":
            rule = "losses and gradients must be finite; the weights are those before this step"
            remedy = f"{way_back(self._checkpoints())}; or set engine.on_nonfinite=skip or rollback"
            raise TrainingError(f"step {step + 1}, {what}", "not finite", rule, remedy)
        self._skipped += 1
        if self._is_main:
            logger.warning("step %d skipped: %s is not finite; weights unchanged", step + 1, what)
        if self._skipped > self._limit:
            limit = f"engine.max_skipped_steps = {self._limit}"
            rule = f"{self._skipped} steps in a row were not finite ({limit})"
            raise TrainingError(f"step {step + 1}", "skipped", rule, way_back(self._checkpoints()))


def way_back(checkpoints: Sequence[int]) -> str:
    """What a person can do about a run whose losses are bad."""
    remedy = "lower optim.lr, or look at the batch with `megam3 inspect-batch`"
    if not checkpoints:
        return remedy
    listed = ", ".join(str(step) for step in checkpoints[-5:])
    return f"{remedy}; if the losses were bad before, go back with train.resume_step (checkpoints: {listed})"
