"""What an evaluation found: as JSON for later, as a table for a person."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

from megam3.files import read_json
from megam3.retrieval.metrics import METRICS


@dataclass(frozen=True)
class ModeResult:
    """Metrics of one retrieval mode: over all queries, and over each language and each length bucket (with
    their number of queries)."""

    overall: dict[str, float]
    by_language: dict[str, dict[str, float]]
    by_length: dict[str, dict[str, float]]
    """By tokens of a query's longest relevant passage."""
    by_query_length: dict[str, dict[str, float]] = field(default_factory=dict)
    """By tokens of the query; empty in files from before it was measured."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """One test set."""

    dataset: str
    num_queries: int
    num_passages: int
    num_tokens: int
    """Passage tokens, as the model read them."""
    num_at_limit: int
    """Passages and queries that reach their limit: cut there, or exactly that long."""
    seconds: float
    modes: dict[str, ModeResult]

    def scalars(self) -> dict[str, float]:
        """Flat names for logs, such as `eval/heldout/All/ndcg@10`."""
        return {
            f"eval/{self.dataset}/{mode}/{name}": value
            for mode, result in self.modes.items()
            for name, value in result.overall.items()
        }

    def write(self, path: str | Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".new")
        aside.write_text(json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(aside, path)


def read_result(path: str | Path) -> EvaluationResult:
    """Read what `EvaluationResult.write` wrote."""
    fields = read_json(path)
    fields["modes"] = {mode: ModeResult(**values) for mode, values in fields["modes"].items()}
    return EvaluationResult(**fields)


def overall_table(results: Sequence[EvaluationResult]) -> Table:
    """Modes as rows; every test set gives one column per metric."""
    table = Table(title="retrieval", title_justify="left")
    table.add_column("mode")
    for result in results:
        for name in METRICS:
            table.add_column(f"{result.dataset}\n{name}" if len(results) > 1 else name, justify="right")
    for mode in dict.fromkeys(mode for result in results for mode in result.modes):
        cells = [
            f"{r.modes[mode].overall[name]:.3f}" if mode in r.modes else ""
            for r in results
            for name in METRICS
        ]
        table.add_row(mode, *cells)
    return table


def group_table(result: EvaluationResult, by: str, metric: str = METRICS[0]) -> Table:
    """Groups (`by` is language, length or query_length) as rows, modes as columns, one metric."""
    groups = {mode: getattr(values, f"by_{by}") for mode, values in result.modes.items()}
    words = by.replace("_", " ")
    table = Table(title=f"{result.dataset}: {metric} by {words}", title_justify="left")
    table.add_column(words)
    table.add_column("queries", justify="right")
    for mode in groups:
        table.add_column(mode, justify="right")
    for group, values in next(iter(groups.values())).items():
        table.add_row(
            group,
            f"{values['queries']:.0f}",
            *(f"{of_mode[group][metric]:.3f}" for of_mode in groups.values()),
        )
    return table
