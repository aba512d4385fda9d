"""From a step of a run back to the records it was given: dataset, row, file and line.

    rows_of_step(data, step=40, skipped=[[3, 5]])     the batches of the 41st step, at place 42 of the plan

A row is a number among the rows of all datasets of a recipe, in its order, as in the log and in
`megam3 inspect-batch`.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from megam3.data.dataset import TrainingData
from megam3.data.skips import Ranges, merge_ranges, place_of
from megam3.data.source import place


@dataclass(frozen=True, kw_only=True)
class RowsServed:
    """Rows of one batch over all ranks."""

    number: int
    """Of the batch, counted from the first epoch's first."""
    epoch: int
    index: int
    """Within the epoch."""
    rows_by_dataset: dict[str, list[int]]
    """By the name of the dataset, in the batch's order."""

    def as_json(self) -> dict[str, Any]:
        """For a file of lines."""
        return {"epoch": self.epoch, "batch": self.index, "rows": self.rows_by_dataset}


def batches_of_step(data: TrainingData, step: int, skipped: Ranges = ()) -> range:
    """Numbers of the batches of 0-based step `step`; `skipped` are places that the run went round."""
    size = data.config.batch.accumulation_steps
    first = place_of(step, merge_ranges(skipped)) * size
    return range(first, first + size)


def rows_of_step(data: TrainingData, step: int, skipped: Ranges = ()) -> list[RowsServed]:
    """What all ranks together were given in 0-based optimizer step `step`; reads the plan and no record."""
    found = []
    for number in batches_of_step(data, step, skipped):
        planned = data.plan.batch(number)
        by_dataset: dict[str, list[int]] = {}
        for row in planned.rows.tolist():
            name = data.datasets[dataset_of(data, row)].manifest.name
            by_dataset.setdefault(name, []).append(row)
        found.append(
            RowsServed(number=number, epoch=planned.epoch, index=planned.index, rows_by_dataset=by_dataset)
        )
    return found


def dataset_of(data: TrainingData, row: int) -> int:
    """Index of the dataset that holds a row."""
    return bisect_right(data.plan.datasets, row, key=lambda shape: shape.first_row) - 1


def source_of(data: TrainingData, row: int) -> str:
    """`file:line` that a row was read from."""
    index = dataset_of(data, row)
    stored = data.datasets[index]
    shard, position = stored.shard_of(row - data.plan.datasets[index].first_row)
    unit = stored.manifest.spec.units[shard]
    return place(unit, int(stored.shard(shard).columns["line"][position]))
