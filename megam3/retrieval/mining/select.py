"""Which candidates of one query become its negatives: ranks, scores and hashes in, places and reasons out.

A candidate is taken out for the FIRST of these that holds:

    out of range      its rank, counted from 0 over all candidates, is not in low … high-1
    known positive    its text is a positive of this query in any record
    the query         its text is the query itself
    margin            score > s⁺ - margin
    ratio             score > s⁺ - (1 - ratio)·|s⁺|, which is ratio·s⁺ where s⁺ > 0 (TopK-PercPos of
                      NV-Retriever, arXiv 2407.15831, which found 0.95 best)
    max score         score > max_score
    min score         score < min_score

s⁺ is the lowest (or highest) score among the record's own positives. From the rest `negatives` are drawn, or
the first ones taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from megam3.errors import ConfigError

KEPT = "kept"
REASONS = ("out of range", "known positive", "the query", "margin", "ratio", "max score", "min score", KEPT)


@dataclass(frozen=True, kw_only=True)
class SelectOptions:
    """Filters and sampling; None: no such filter."""

    low: int = 10
    high: int = 210
    negatives: int = 15
    margin: float | None = None
    ratio: float | None = None
    max_score: float | None = None
    min_score: float | None = None
    positive_score: Literal["min", "max"] = "min"
    """Which of several positives' scores the margin and the ratio are taken from."""
    sample: Literal["random", "first"] = "random"
    """Draw from those that are left, or take the best ranked."""
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for a range, count or ratio that cannot be."""
        if not 0 <= self.low < self.high:
            remedy = "write LOW-HIGH, e.g. 10-210"
            given = f"{self.low}-{self.high}"
            raise ConfigError("--range", given, "must be two ranks, the lower first", remedy)
        if self.negatives < 1:
            raise ConfigError("--negatives", self.negatives, "must be at least 1", "set it to 7 or 15")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ConfigError("--ratio", self.ratio, "must be above 0 and at most 1", "try 0.95")
        if self.positive_score not in ("min", "max") or self.sample not in ("random", "first"):
            given = f"{self.positive_score}, {self.sample}"
            remedy = "check the spelling"
            raise ConfigError("select", given, "must be min or max, and random or first", remedy)


@dataclass(frozen=True)
class Selection:
    """The outcome for one query."""

    chosen: np.ndarray
    """Places among the candidates, best first."""
    reasons: np.ndarray
    """int8 of each candidate: index into REASONS."""


def score_ceiling(positive_scores: np.ndarray, options: SelectOptions) -> dict[str, float]:
    """Highest score that each score filter lets through; infinite without the filter."""
    best = float(positive_scores.min() if options.positive_score == "min" else positive_scores.max())
    none = float("inf")
    return {
        "margin": none if options.margin is None else best - options.margin,
        "ratio": none if options.ratio is None else best - (1 - options.ratio) * abs(best),
        "max score": none if options.max_score is None else options.max_score,
    }


def select_negatives(
    scores_K: np.ndarray,
    hashes_K: np.ndarray,
    positive_scores: np.ndarray,
    known_hashes: np.ndarray,
    query_hash: int,
    options: SelectOptions,
) -> Selection:
    """Choose negatives among candidates in the order of their ranks.

    The draw depends on the seed and the query alone, not on ranks, parts or other records.
    """
    rank_K = np.arange(len(scores_K))
    ceilings = score_ceiling(positive_scores, options)
    floor = -np.inf if options.min_score is None else options.min_score
    tests = (
        (rank_K < options.low) | (rank_K >= options.high),
        np.isin(hashes_K, known_hashes),
        hashes_K == query_hash,
        scores_K > ceilings["margin"],
        scores_K > ceilings["ratio"],
        scores_K > ceilings["max score"],
        scores_K < floor,
    )
    reasons = np.full(len(scores_K), REASONS.index(KEPT), dtype=np.int8)
    for number in reversed(range(len(tests))):
        reasons[tests[number]] = number
    left = np.flatnonzero(reasons == REASONS.index(KEPT))
    if options.sample == "first" or len(left) <= options.negatives:
        return Selection(left[: options.negatives], reasons)
    draw = np.random.default_rng([options.seed, query_hash & 0xFFFFFFFFFFFFFFFF])
    return Selection(np.sort(draw.choice(left, options.negatives, replace=False)), reasons)
