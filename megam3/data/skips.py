"""Ranges of the plan that a run goes round: a step's place in the plan once some of it is left out.

    plan      0 1 2 3 4 5 6 7 8        skipped: (3, 6), that is 3, 4 and 5
    step      0 1 2 . . . 3 4 5

The ranges are places in the plan, not steps, so a run may skip again behind an earlier gap and every step
before a gap keeps its place: a checkpoint from before it needs no other data than it had.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Ranges = Sequence[Sequence[int]]
"""(first, stop) pairs of places in the plan."""


def merge_ranges(ranges: Ranges) -> list[list[int]]:
    """The same places in ascending pairs that neither overlap nor touch.

    >>> merge_ranges([(8, 9), (2, 5), (4, 7)])
    [[2, 7], [8, 9]]
    """
    merged: list[list[int]] = []
    for first, stop in sorted((first, stop) for first, stop in ranges):
        if merged and first <= merged[-1][1]:
            merged[-1][1] = max(stop, merged[-1][1])
        else:
            merged.append([first, stop])
    return merged


def place_of(step: int, skipped: Ranges) -> int:
    """Place in the plan that `step` serves; `skipped` as `merge_ranges` gives them.

    >>> [place_of(step, [[3, 6]]) for step in range(5)]
    [0, 1, 2, 6, 7]
    """
    for first, stop in skipped:
        if step < first:
            break
        step += stop - first
    return step


class ServedBatches(Sequence[int]):
    """Numbers of the batches of steps start … stop-1, `per_step` each; takes no memory per step."""

    def __init__(self, start: int, stop: int, per_step: int, skipped: Ranges):
        self._start, self._num_steps, self._per_step = start, max(0, stop - start), per_step
        self._skipped = merge_ranges(skipped)

    def __len__(self) -> int:
        return self._num_steps * self._per_step

    def __getitem__(self, index: Any) -> Any:
        """One number; negative indices and slices are not needed and not offered."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, part = divmod(index, self._per_step)
        return place_of(self._start + step, self._skipped) * self._per_step + part
