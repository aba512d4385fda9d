"""From runs of rows to cells of batches: everything about a plan that does not depend on the epoch.

A *run* is neighbouring rows of a shard with one language and one length (the shard is sorted by both). A
*stratum* is the rows of one dataset, language and length bucket: a list of row ranges. A *group* is the
strata that may share a batch (same dataset, language or task, as the recipe says). A *cell* is a group's
bucket, with its batches.

A trace, with buckets ≤ 500 and ≤ 1000 tokens and 3 queries a step in both:

    runs       rows 0–3   de, longest 120 ┐
               rows 4–6   de, longest 480 ┘─ same bucket, side by side: one range
               rows 7–8   sw, longest 300
               shard 2: rows 9–10  de, longest 90;  rows 11–14  de, longest 900
    strata     de ≤ 500   ranges 0–6, 9–10     9 rows        first_rows 0 9     ends 7 9
               sw ≤ 500   range  7–8           2 rows
               de ≤ 1000  range  11–14         4 rows
    groups     homogeneous_by: dataset, so all three are one group `d`
    cells      d ≤ 500    11 rows                 3 batches of 3, 2 rows carried up
               d ≤ 1000   4 rows + 2 carried      2 batches of 3

Rows that do not fill a batch in their cell are carried up to the group's next longer cell, where they fit
too; only the longest cell has short batches, at most two, of at least half the size each (`place_rows`). A
group that cannot fill half a batch shares batches with other such groups. Nothing is per row: a billion rows
are 4 million runs on disk (benchmarks/plan_scale.py), and far fewer ranges in memory.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from megam3.config.batch_size import bucket_edges, queries_in_buckets
from megam3.config.schema import DataConfig
from megam3.errors import DataError

RUNS_PER_BLOCK = 1 << 18
"""Runs are read block by block, 7 MB each: a billion rows have millions of them."""


@dataclass(frozen=True, kw_only=True)
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
    """manifest.RUN_DTYPE; rows of the dataset, from 0."""
    first_row: int
    """Row 0's number among the rows of all datasets."""


@dataclass(frozen=True, kw_only=True)
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
    """Rows with which a shorter cell of the group fills no batch: positions from `start` on of `cell`."""

    cell: int
    start: int
    count: int


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One group's bucket and its batches."""

    group: str
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
        num_short = max(0, batch - self.num_full)
        start = min(batch, self.num_full) * self.batch_queries + sum(self.tails[:num_short])
        size = self.batch_queries if batch < self.num_full else self.tails[num_short]
        return start, start + size


@dataclass(frozen=True)
class Ranges:
    """Row ranges of one stratum."""

    first_rows: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Placed:
    """Batches of one cell: how many full ones, and the sizes of the short ones after them."""

    num_full: int
    tails: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class GroupBucket:
    """The rows of a group in one of its buckets, before they are placed."""

    strata: tuple[int, ...]
    max_tokens: int
    num_served: int
    batch_queries: int


def build_strata(config: DataConfig, datasets: Sequence[DatasetRows]) -> list[Stratum]:
    """All strata with rows, in a fixed order: by dataset, then language code, then bucket.

    Raises:
        ConfigError: buckets that do not ascend or do not reach the longest text.
        DataError: no row at all.
    """
    edges = bucket_edges(config)
    found = [
        (index, dataset.languages[language], bucket, ranges)
        for index, dataset in enumerate(datasets)
        for (language, bucket), ranges in sorted(_ranges(dataset, edges).items(), key=lambda item: item[0])
    ]
    if not found:
        raise DataError("data.train", [dataset.name for dataset in datasets], "has no rows", "add data")
    rows_of: dict[str, int] = {}
    for _, language, _, ranges in found:
        rows_of[language] = rows_of.get(language, 0) + int(ranges.counts.sum())
    factors = _language_factors(rows_of, config.language_temperature)
    strata = []
    for index, language, bucket, ranges in found:
        ends = np.cumsum(ranges.counts)
        strata.append(
            Stratum(
                dataset=index,
                language=language,
                bucket=bucket,
                first_rows=ranges.first_rows,
                ends=ends,
                # half up: round() would go to the even neighbour
                num_served=int(datasets[index].weight * factors[language] * int(ends[-1]) + 0.5),
            )
        )
    return strata


def _ranges(dataset: DatasetRows, edges: list[int]) -> dict[tuple[int, int], Ranges]:
    """Row ranges by (language code, bucket). Vectorised: a loop over millions of runs would take minutes."""
    parts: dict[tuple[int, int], list[Ranges]] = {}
    for start in range(0, len(dataset.runs), RUNS_PER_BLOCK):
        block = dataset.runs[start : start + RUNS_PER_BLOCK]
        bucket = np.searchsorted(edges, block["longest"])
        assert bucket.max() < len(edges), "the last bucket holds the longest text the store's limits allow"
        # one number for (language, bucket); where it changes, a range begins. Shards lie one after the other,
        # so a range may also reach over the edge of two shards
        stratum = block["language"].astype(np.int64) * len(edges) + bucket
        heads = np.flatnonzero(np.diff(stratum, prepend=-1))
        counts = np.add.reduceat(block["num_rows"], heads)
        first_rows = block["first_row"][heads] + dataset.first_row
        for value in np.unique(stratum[heads]).tolist():
            chosen = stratum[heads] == value
            part = Ranges(first_rows[chosen], counts[chosen])
            parts.setdefault(divmod(value, len(edges)), []).append(part)
        if isinstance(dataset.runs.base, mmap.mmap):
            # read once: the pages need not stay, and count as memory of this process
            dataset.runs.base.madvise(mmap.MADV_DONTNEED)
    return {
        key: Ranges(
            np.concatenate([part.first_rows for part in found]),
            np.concatenate([part.counts for part in found]),
        )
        for key, found in parts.items()
    }


def _language_factors(rows_of: dict[str, int], temperature: float) -> dict[str, float]:
    """Times to serve a row of each language for shares in proportion to rows ** (1 / temperature)."""
    if temperature == 1.0:
        return dict.fromkeys(rows_of, 1.0)
    powers = {language: rows ** (1.0 / temperature) for language, rows in rows_of.items()}
    # the epoch keeps its length: factors times rows add up to all rows
    scale = sum(rows_of.values()) / sum(powers.values())
    return {language: scale * power / rows_of[language] for language, power in powers.items()}


def build_cells(config: DataConfig, datasets: Sequence[DatasetRows], strata: Sequence[Stratum]) -> list[Cell]:
    """Group strata, size their batches and place every served row in exactly one batch."""
    # pairs and texts are different batches, and whether in-batch negatives count is a property of a whole
    # batch
    kinds: dict[tuple[bool, bool], dict[str, list[int]]] = {}
    for index, stratum in enumerate(strata):
        dataset = datasets[stratum.dataset]
        names = {"dataset": dataset.name, "language": stratum.language, "task": dataset.task}
        if stratum.num_served:
            groups = kinds.setdefault((dataset.is_text, dataset.in_batch_negatives), {})
            groups.setdefault(names[config.homogeneous_by], []).append(index)
    cells: list[Cell] = []
    for _, groups in sorted(kinds.items()):
        for name, members in _merge_small(config, datasets, strata, groups).items():
            cells += _group_cells(name, _buckets(config, datasets, strata, members), strata, first=len(cells))
    return cells


def _buckets(
    config: DataConfig, datasets: Sequence[DatasetRows], strata: Sequence[Stratum], members: Iterable[int]
) -> list[GroupBucket]:
    """The buckets in which these strata have rows, shortest first."""
    members = list(members)
    owners = [datasets[strata[index].dataset] for index in members]
    # the largest group counts: a batch of several datasets must fit the token budget whoever its rows are
    # from
    steps = queries_in_buckets(config, max(owner.passages_per_query for owner in owners), owners[0].is_text)
    found = []
    for bucket in sorted({strata[index].bucket for index in members}):
        own = tuple(index for index in members if strata[index].bucket == bucket)
        num_served = sum(strata[index].num_served for index in own)
        found.append(
            GroupBucket(
                strata=own,
                max_tokens=steps[bucket].max_tokens,
                num_served=num_served,
                batch_queries=steps[bucket].queries,
            )
        )
    return found


def _place(buckets: Sequence[GroupBucket], may_be_small: bool = False) -> list[Placed] | None:
    rows, queries = [bucket.num_served for bucket in buckets], [bucket.batch_queries for bucket in buckets]
    return place_rows(rows, queries, may_be_small)


def _merge_small(
    config: DataConfig,
    datasets: Sequence[DatasetRows],
    strata: Sequence[Stratum],
    groups: dict[str, list[int]],
) -> dict[str, list[int]]:
    """Groups that cannot fill half a batch become one; if that one cannot either, it joins the largest group.

    A batch of few queries has few negatives, so its loss is of another scale; such batches are worse than
    mixed ones.
    """

    def fills_half(members: list[int]) -> bool:
        return _place(_buckets(config, datasets, strata, members)) is not None

    large = {name: members for name, members in groups.items() if fills_half(members)}
    small = [index for name, members in groups.items() if name not in large for index in members]
    if not small:
        return large
    if not large or fills_half(small):
        name = next(iter(groups)) if len(groups) == 1 else "mixed"
        return {**large, name: small}
    # the name breaks ties, so that the plan does not depend on the order of a dictionary
    host = max(large, key=lambda name: (sum(strata[index].num_served for index in large[name]), name))
    return {**large, host: sorted(large[host] + small)}


def place_rows(rows: list[int], queries: list[int], may_be_small: bool = False) -> list[Placed] | None:
    """The batches of each of a group's cells, shortest first; what one does not place is carried to the next.

    The last cell's rest is a short batch if it fills half of one. A smaller rest is made up in one of two
    ways:

        rows 9, queries 4        2 full, rest 1       1 full, then 5 rows as short batches of 3 and 2
        rows 8 1, queries 8 4    0 full, rest 1       the shorter cell gives up its batch: 9 = 1 full, 3, 2

    Returns None if all the rows together cannot fill half a batch of the last cell, unless `may_be_small`.
    """
    given_up = [0] * len(rows)
    # each turn gives up one more full batch of a shorter cell, the longest of them first, whose rows are the
    # nearest in length to those they join; that ends after as many turns as there are batches, and one is
    # nearly always enough
    while True:
        placed: list[Placed] = []
        carried = 0
        for own, size, fewer in zip(rows[:-1], queries[:-1], given_up):
            full = max(0, (own + carried) // size - fewer)
            placed.append(Placed(full))
            carried += own - full * size
        full, rest = divmod(rows[-1] + carried, queries[-1])
        if rest == 0 or 2 * rest >= queries[-1]:
            return [*placed, Placed(full, (rest,) if rest else ())]
        if full:
            total = queries[-1] + rest
            return [*placed, Placed(full - 1, (total - total // 2, total // 2))]
        giver = max((index for index, cell in enumerate(placed) if cell.num_full), default=None)
        if giver is None:
            return [*placed, Placed(0, (rest,))] if may_be_small else None
        given_up[giver] += 1


def _group_cells(
    group: str, buckets: Sequence[GroupBucket], strata: Sequence[Stratum], first: int
) -> list[Cell]:
    """The cells of one group; the first gets number `first`."""
    placed = _place(buckets, may_be_small=True)
    assert placed is not None
    cells: list[Cell] = []
    carried: Carried | None = None
    for bucket, batches in zip(buckets, placed):
        cell = Cell(
            group=group,
            max_tokens=bucket.max_tokens,
            strata=bucket.strata,
            stratum_ends=np.cumsum([strata[index].num_served for index in bucket.strata]),
            carried=carried,
            num_full=batches.num_full,
            batch_queries=bucket.batch_queries,
            tails=batches.tails,
        )
        # the cell's permutation shuffles own and carried rows together, so what goes up is drawn anew every
        # epoch
        left = cell.size - batches.num_full * bucket.batch_queries - sum(batches.tails)
        carried = Carried(first + len(cells), cell.size - left, left) if left else None
        cells.append(cell)
    assert carried is None, "every row has its batch"
    return cells
