"""From runs of rows to cells of batches: everything about a plan that does not depend on the epoch.

A *stratum* is the rows of one dataset, language and length bucket: a list of row ranges. A *group* is the strata that may share a batch
(same dataset, language or task, as the recipe says). A *cell* is a group's bucket. Rows that do not fill a batch in their cell are carried
up to the group's next longer cell, where they fit too; with 3 queries a step:

    cell ≤ 500     7 rows of its own                     2 batches, 1 row carried up
    cell ≤ 1000    4 rows of its own + 1 carried         1 batch of 3; the last 2 rows are a short batch
    cell ≤ 8192    none: no cell

so a group has at most two short batches, of at least half the size each. A group that cannot fill half a batch shares batches with other
such groups.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megam3.config.schema import DataConfig
from megam3.data.buckets import bucket_edges, bucket_queries
from megam3.errors import DataError

RUNS_PER_BLOCK = 1 << 18  # runs are read block by block: a billion rows have millions of them


@dataclass(frozen=True)
class DatasetRows:
    """What the plan needs to know of one dataset."""

    name: str
    task: str
    weight: float
    in_batch_negatives: bool
    passages_per_query: int
    is_text: bool
    languages: Sequence[str]
    runs: np.ndarray
    """store.RUN_DTYPE; rows of the dataset, from 0."""
    first_row: int
    """Row 0's number among the rows of all datasets."""


@dataclass(frozen=True)
class Stratum:
    """Rows of one dataset, language and bucket."""

    dataset: int
    language: str
    bucket: int
    first_rows: np.ndarray
    """First row of each range, among all datasets."""
    ends: np.ndarray
    """Rows up to the end of each range, cumulative."""
    num_served: int
    """Times a row of it is served in an epoch; equals its rows at weight 1."""

    @property
    def num_rows(self) -> int:
        """Rows it has."""
        return int(self.ends[-1])


@dataclass(frozen=True)
class Carried:
    """Rows that a shorter cell of the same group could not fill a batch with: positions `start` … of cell `cell`."""

    cell: int
    start: int
    count: int


@dataclass(frozen=True)
class Cell:
    """One group's bucket and its batches."""

    group: str
    bucket: int
    max_tokens: int
    strata: tuple[int, ...]
    stratum_ends: np.ndarray
    """Served rows up to the end of each stratum, cumulative."""
    carried: Carried | None
    num_full: int
    batch_queries: int
    tails: tuple[int, ...]
    """Sizes of the short batches after the full ones."""

    @property
    def num_own(self) -> int:
        """Served rows of the cell's own strata."""
        return int(self.stratum_ends[-1]) if len(self.stratum_ends) else 0

    @property
    def size(self) -> int:
        """Own and carried rows."""
        return self.num_own + (self.carried.count if self.carried else 0)

    @property
    def num_batches(self) -> int:
        """Full and short ones."""
        return self.num_full + len(self.tails)

    def span(self, batch: int) -> tuple[int, int]:
        """Positions start … stop-1 of one batch."""
        start = min(batch, self.num_full) * self.batch_queries + sum(
            self.tails[: max(0, batch - self.num_full)]
        )
        return start, start + (
            self.batch_queries if batch < self.num_full else self.tails[batch - self.num_full]
        )


def build_strata(config: DataConfig, datasets: Sequence[DatasetRows]) -> list[Stratum]:
    """All strata with rows, in a fixed order.

    Raises:
        ConfigError: buckets that do not ascend or do not reach the longest text.
        DataError: no row at all.
    """
    edges = bucket_edges(config)
    ranges: dict[tuple[int, str, int], tuple[np.ndarray, np.ndarray]] = {}
    for number, dataset in enumerate(datasets):
        for (language, bucket), found in sorted(_ranges(dataset, edges).items()):
            ranges[number, dataset.languages[language], bucket] = found
    if not ranges:
        raise DataError("data.train", [dataset.name for dataset in datasets], "has no rows", "add data")
    rows_of: dict[str, int] = {}
    for (_, name, _), (_, counts) in ranges.items():
        rows_of[name] = rows_of.get(name, 0) + int(counts.sum())
    factor = _language_factors(rows_of, config.language_temperature)
    strata = []
    for (number, name, bucket), (first_rows, counts) in ranges.items():
        ends = np.cumsum(counts)
        served = int(datasets[number].weight * factor[name] * int(ends[-1]) + 0.5)
        strata.append(Stratum(number, name, bucket, first_rows, ends, served))
    return strata


def _ranges(dataset: DatasetRows, edges: list[int]) -> dict[tuple[int, int], tuple[np.ndarray, np.ndarray]]:
    """Per (language code, bucket): first rows (among all datasets) and lengths of the row ranges."""
    parts: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
    for start in range(0, len(dataset.runs), RUNS_PER_BLOCK):
        block = dataset.runs[start : start + RUNS_PER_BLOCK]
        bucket = np.searchsorted(edges, block["longest"])
        assert bucket.max() < len(edges), "the last bucket holds the longest text the store's limits allow"
        cell = block["language"].astype(np.int64) * len(edges) + bucket
        heads = np.flatnonzero(np.diff(cell, prepend=-1))
        counts, first = (
            np.add.reduceat(block["num_rows"], heads),
            block["first_row"][heads] + dataset.first_row,
        )
        for value in np.unique(cell[heads]).tolist():
            chosen = cell[heads] == value
            parts.setdefault(divmod(value, len(edges)), []).append((first[chosen], counts[chosen]))
        if isinstance(dataset.runs.base, mmap.mmap):
            dataset.runs.base.madvise(
                mmap.MADV_DONTNEED
            )  # read once: its pages need not stay in this process
    return {
        key: (np.concatenate([f for f, _ in found]), np.concatenate([c for _, c in found]))
        for key, found in parts.items()
    }


def _language_factors(rows_of: dict[str, int], temperature: float) -> dict[str, float]:
    """How many times a row of each language is served so that languages appear in proportion to rows ** (1 / temperature)."""
    if temperature == 1.0:
        return dict.fromkeys(rows_of, 1.0)
    powers = {language: rows ** (1.0 / temperature) for language, rows in rows_of.items()}
    scale = sum(rows_of.values()) / sum(powers.values())
    return {language: scale * power / rows_of[language] for language, power in powers.items()}


def build_cells(config: DataConfig, datasets: Sequence[DatasetRows], strata: Sequence[Stratum]) -> list[Cell]:
    """Group strata, size their batches and place every served row in exactly one batch."""
    groups: dict[tuple[bool, bool], dict[str, list[int]]] = {}
    for index, stratum in enumerate(strata):
        dataset = datasets[stratum.dataset]
        label = {"dataset": dataset.name, "language": stratum.language, "task": dataset.task}[
            config.homogeneous_by
        ]
        if stratum.num_served:
            groups.setdefault((dataset.is_text, dataset.in_batch_negatives), {}).setdefault(label, []).append(
                index
            )
    cells: list[Cell] = []
    for _, group in sorted(groups.items()):
        for label, members in _merge_small(config, datasets, strata, group).items():
            cells += _group_cells(config, datasets, strata, label, members, first=len(cells))
    return cells


def _merge_small(
    config: DataConfig,
    datasets: Sequence[DatasetRows],
    strata: Sequence[Stratum],
    group: dict[str, list[int]],
) -> dict[str, list[int]]:
    """Groups that cannot fill half a batch become one; if that one cannot either, it joins the largest group."""
    large = {
        label: members
        for label, members in group.items()
        if _place(config, datasets, strata, members) is not None
    }
    small = [index for label, members in group.items() if label not in large for index in members]
    if not small:
        return large
    if not large or _place(config, datasets, strata, small) is not None:
        label = next(iter(group)) if len(group) == 1 else "mixed"
        return {**large, label: small}
    host = max(large, key=lambda label: (sum(strata[i].num_served for i in large[label]), label))
    return {**large, host: sorted(large[host] + small)}


def _sizes(
    config: DataConfig, datasets: Sequence[DatasetRows], strata: Sequence[Stratum], members: list[int]
) -> tuple[list[int], list[int], list[int]]:
    """Of the buckets a group has rows in: the buckets, served rows and queries of a step."""
    owners = [datasets[strata[index].dataset] for index in members]
    queries = bucket_queries(config, max(owner.passages_per_query for owner in owners), owners[0].is_text)
    buckets = sorted({strata[index].bucket for index in members})
    rows = [
        sum(strata[index].num_served for index in members if strata[index].bucket == bucket)
        for bucket in buckets
    ]
    return buckets, rows, [queries[bucket] for bucket in buckets]


def _place(
    config: DataConfig, datasets: Sequence[DatasetRows], strata: Sequence[Stratum], members: list[int]
) -> list | None:
    _, rows, queries = _sizes(config, datasets, strata, members)
    return place_rows(rows, queries)


def place_rows(
    rows: list[int], queries: list[int], may_be_small: bool = False
) -> list[tuple[int, tuple[int, ...]]] | None:
    """(full batches, sizes of short batches) of each of a group's cells, shortest first; what a cell does not place is carried to the next.

    Returns None if all the rows together cannot fill half a batch of the last cell, unless `may_be_small`.
    """
    lent = [0] * len(rows)
    while True:
        placed: list[tuple[int, tuple[int, ...]]] = []
        carried = 0
        for own, size, lend in zip(rows[:-1], queries[:-1], lent):
            full = max(0, (own + carried) // size - lend)
            placed.append((full, ()))
            carried += own - full * size
        full, rest = divmod(rows[-1] + carried, queries[-1])
        if rest == 0 or 2 * rest >= queries[-1]:
            return [*placed, (full, (rest,) if rest else ())]
        if full:
            total = queries[-1] + rest
            return [*placed, (full - 1, (total - total // 2, total // 2))]
        lender = max((i for i, (count, _) in enumerate(placed) if count), default=None)
        if lender is None:
            return [*placed, (0, (rest,))] if may_be_small else None
        lent[lender] += 1


def _group_cells(
    config: DataConfig,
    datasets: Sequence[DatasetRows],
    strata: Sequence[Stratum],
    label: str,
    members: list[int],
    first: int,
) -> list[Cell]:
    buckets, rows, queries = _sizes(config, datasets, strata, members)
    placed = place_rows(rows, queries, may_be_small=True)
    assert placed is not None
    edges = bucket_edges(config)
    cells: list[Cell] = []
    carried: Carried | None = None
    for bucket, size, (full, tails) in zip(buckets, queries, placed):
        own = tuple(index for index in members if strata[index].bucket == bucket)
        ends = np.cumsum([strata[index].num_served for index in own])
        cell = Cell(label, bucket, edges[bucket], own, ends, carried, full, size, tails)
        left = cell.size - full * size - sum(tails)
        carried = Carried(first + len(cells), cell.size - left, left) if left else None
        cells.append(cell)
    assert carried is None, "every row has its batch"
    return cells
