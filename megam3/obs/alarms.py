"""Signs of trouble in the figures of a run: ranks slower than the others, and losses that jump. Pure: numbers
in, words out.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

STRAGGLER_RATIO = 1.3
"""A rank is reported when a part of its step takes this many times the fastest rank's; 1.1 is common between
equal machines.
"""


@dataclass(frozen=True, kw_only=True)
class Straggler:
    """A rank that the others wait for, in one part of the step."""

    part: str
    rank: int
    ratio: float
    """Its seconds over those of the fastest rank."""
    seconds: float

    def __str__(self) -> str:
        return (
            f"rank {self.rank}: {self.part} {self.ratio:.2f} x the fastest rank ({self.seconds:.3f} s a step)"
        )


def relative_times(seconds_of_ranks: Sequence[float]) -> list[float]:
    """Each rank's time over the fastest rank's.

    >>> relative_times([2.0, 4.0, 2.5])
    [1.0, 2.0, 1.25]
    """
    fastest = min(seconds_of_ranks)
    return [seconds / fastest if fastest > 0 else 1.0 for seconds in seconds_of_ranks]


def find_stragglers(
    seconds_by_part: Mapping[str, Sequence[float]],
    step_seconds: float,
    ratio: float = STRAGGLER_RATIO,
    min_share: float = 0.05,
) -> list[Straggler]:
    """Ranks that are slower than the fastest by `ratio`, worst first.

    Args:
        seconds_by_part: per part of a step (data, forward …), the seconds of every rank; waiting for others
            left out.
        step_seconds: of a whole step; a difference below `min_share` of it costs nobody anything.
        ratio: from which a rank is reported.
    """
    found = []
    for part, seconds in seconds_by_part.items():
        fastest = min(seconds)
        for rank, (own, times) in enumerate(zip(seconds, relative_times(seconds), strict=True)):
            if times >= ratio and own - fastest >= min_share * step_seconds:
                found.append(Straggler(part=part, rank=rank, ratio=times, seconds=own))
    return sorted(found, key=lambda straggler: -straggler.seconds)


class StragglerWatch:
    """Adds up what every rank took for the parts of its steps, and names the slow ones once a window is long
    enough.

    Args:
        min_seconds: of a window; over a few short steps the noise of a shared machine looks like a slow rank.
        now: a clock in seconds.
    """

    def __init__(self, min_seconds: float = 30.0, now: Callable[[], float] = time.monotonic):
        self._min_seconds, self._now = min_seconds, now
        self._begin()

    def add(self, seconds_by_part: Mapping[str, Sequence[float]]) -> None:
        """One step: per part, the seconds of every rank."""
        self._steps += 1
        for part, seconds in seconds_by_part.items():
            before = self._sums.get(part, [0.0] * len(seconds))
            self._sums[part] = [one + other for one, other in zip(before, seconds, strict=True)]

    def read(self) -> list[Straggler]:
        """The slow ranks of the window, worst first, and begin a new one; none while it is too short."""
        elapsed = self._now() - self._began
        if elapsed < self._min_seconds or not self._steps:
            return []
        means = {part: [total / self._steps for total in totals] for part, totals in self._sums.items()}
        found = find_stragglers(means, elapsed / self._steps)
        self._begin()
        return found

    def _begin(self) -> None:
        self._began, self._steps = self._now(), 0
        self._sums: dict[str, list[float]] = {}


class SpikeAlarm:
    """Says when a loss is far above the recent ones: median + `deviations` times their spread (1.4826 x
    median distance to the median).

    The median and its distance are not moved by a spike itself, so a second one is noticed as well. The
    spread counts as at least 2 % of the
    median: a loss that hardly moves must not make a spike of its noise.
    """

    def __init__(self, window: int = 50, deviations: float = 8.0, min_values: int = 20):
        self._recent: deque[float] = deque(maxlen=window)
        self._deviations, self._min_values = deviations, min_values

    def check(self, loss: float) -> str | None:
        """What to say of this loss, or None; it then counts among the recent ones. Values that are not finite
        are no spikes but errors.
        """
        said = None
        if not math.isfinite(loss):
            return None
        if len(self._recent) >= self._min_values:
            middle = statistics.median(self._recent)
            distance = 1.4826 * statistics.median(abs(value - middle) for value in self._recent)
            limit = middle + self._deviations * max(distance, 0.02 * abs(middle))
            if loss > limit:
                recent = f"the last {len(self._recent)} had a median of {middle:.4g} (limit {limit:.4g})"
                said = f"loss {loss:.4g}, where {recent}"
        self._recent.append(loss)
        return said
