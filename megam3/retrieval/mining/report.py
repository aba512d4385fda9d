"""What mining did: how many candidates each filter took out, how many negatives were found, and examples to
read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from megam3.retrieval.mining.select import KEPT, REASONS

MAX_EXAMPLES = 3
"""Of a part; the report keeps as many of all parts."""


@dataclass(kw_only=True)
class Counts:
    """Of some queries; parts write it as JSON, and the report adds them up."""

    queries: int = 0
    candidates: int = 0
    negatives: int = 0
    short: int = 0
    """Queries with fewer negatives than asked for."""
    without: int = 0
    """Queries with none."""
    reasons: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    score_sums: dict[str, float] = field(default_factory=lambda: {"positive": 0.0, "negative": 0.0})
    num_positives: int = 0
    examples: list[dict] = field(default_factory=list)

    def add(self, reasons: np.ndarray, num_chosen: int, wanted: int) -> None:
        """Count one query."""
        self.queries += 1
        self.candidates += len(reasons)
        self.negatives += num_chosen
        self.short += num_chosen < wanted
        self.without += num_chosen == 0
        for number, count in enumerate(np.bincount(reasons, minlength=len(REASONS)).tolist()):
            self.reasons[REASONS[number]] += count

    def add_scores(self, positives: np.ndarray, negatives: np.ndarray) -> None:
        """Sum up scores of one query, for their means."""
        self.score_sums["positive"] += float(positives.sum())
        self.score_sums["negative"] += float(negatives.sum())
        self.num_positives += len(positives)


def add_up(parts: Sequence[dict]) -> Counts:
    """Counts of all parts, given as JSON."""
    total = Counts()
    for part in parts:
        counts = Counts(**part)
        for name in ("queries", "candidates", "negatives", "short", "without", "num_positives"):
            setattr(total, name, getattr(total, name) + getattr(counts, name))
        for reason, count in counts.reasons.items():
            total.reasons[reason] += count
        for kind, value in counts.score_sums.items():
            total.score_sums[kind] += value
        total.examples = (total.examples + counts.examples)[:MAX_EXAMPLES]
    return total


def report_of(total: Counts, about: dict[str, Any]) -> dict[str, Any]:
    """The report as JSON: `about` (settings, sizes), then counts, shares and examples."""
    considered = max(total.candidates - total.reasons["out of range"], 1)
    return {
        **about,
        "queries": total.queries,
        "negatives": total.negatives,
        "negatives_per_query": total.negatives / max(total.queries, 1),
        "queries_with_fewer_than_asked": total.short,
        "queries_without_negatives": total.without,
        "mean_positive_score": total.score_sums["positive"] / max(total.num_positives, 1),
        "mean_negative_score": total.score_sums["negative"] / max(total.negatives, 1),
        "candidates_in_range": considered,
        "taken_out": {name: count for name, count in total.reasons.items() if name != KEPT},
        "share_taken_out": {
            name: count / considered
            for name, count in total.reasons.items()
            if name not in (KEPT, "out of range")
        },
        "examples": total.examples,
    }


def report_table(report: dict[str, Any]) -> Table:
    """The same for a person."""
    table = Table(title="mined negatives", title_justify="left", show_header=False)
    table.add_row("queries", f"{report['queries']:,}")
    table.add_row("negatives", f"{report['negatives']:,} ({report['negatives_per_query']:.1f} a query)")
    table.add_row("queries with fewer than asked", f"{report['queries_with_fewer_than_asked']:,}")
    table.add_row("queries without any", f"{report['queries_without_negatives']:,}")
    means = f"{report['mean_positive_score']:.3f}, {report['mean_negative_score']:.3f}"
    table.add_row("mean score of positives, of negatives", means)
    table.add_row("candidates in range", f"{report['candidates_in_range']:,}")
    for name, share in report["share_taken_out"].items():
        table.add_row(f"taken out: {name}", f"{report['taken_out'][name]:,} ({share:.1%})")
    return table
