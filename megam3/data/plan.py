"""Which rows each step serves: a pure function of (seed, epoch, step), equal on every rank and world size.

An epoch is `num_batches` batches. Three keyed permutations address any of them directly, whatever its number:

    batch b of epoch e ─permute(num_batches)→ (cell, batch of the cell) ─permute(cell size)→ (stratum,
    position) ─→ row

so nothing is shuffled, stored or replayed, and memory is that of the layout: a few numbers per shard and
bucket, none per row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megam3.config.schema import DataConfig
from megam3.data.permute import key_of, permute
from megam3.data.strata import Cell, DatasetRows, Stratum, build_cells, build_strata


@dataclass(frozen=True, kw_only=True)
class PlannedBatch:
    """Rows of one batch over all ranks."""

    epoch: int
    index: int
    """Batch number within the epoch."""
    cell: int
    rows: np.ndarray
    """int64, numbers among the rows of all datasets."""
    passes: np.ndarray
    """int64: times the epoch served the row before; more than 0 only with weights or temperatures above 1."""
    strata: np.ndarray
    """int64: stratum of each row, which knows its dataset and language."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All batches of all epochs."""

    seed: int
    datasets: tuple[DatasetRows, ...]
    strata: tuple[Stratum, ...]
    cells: tuple[Cell, ...]
    fingerprint: str
    """Of everything that decides which rows a step serves; the same in every process."""

    @cached_property
    def _cell_ends(self) -> np.ndarray:
        return np.cumsum([cell.num_batches for cell in self.cells])

    @cached_property
    def _flat(self) -> _Flat:
        return _Flat(self.strata)

    @property
    def num_batches(self) -> int:
        """Batches of one epoch."""
        return int(self._cell_ends[-1])

    @property
    def num_served(self) -> int:
        """Rows served in one epoch."""
        return sum(stratum.num_served for stratum in self.strata)

    @property
    def smallest_batch(self) -> int:
        """Queries of the smallest batch: no more ranks than this can share the plan."""
        return min(
            size
            for cell in self.cells
            for size in (*cell.tails, *([cell.batch_queries] if cell.num_full else []))
        )

    def batch(self, number: int) -> PlannedBatch:
        """Batch `number`, counted over all epochs from 0."""
        epoch, index = divmod(number, self.num_batches)
        # the order of batches is a keyed permutation: nothing is shuffled in memory, whatever the number of
        # batches
        place = int(permute(np.array([index]), self.num_batches, key_of(self.seed, epoch, "order"))[0])
        cell = int(np.searchsorted(self._cell_ends, place, side="right"))
        start, stop = self.cells[cell].span(place - int(self._cell_ends[cell] - self.cells[cell].num_batches))
        rows, passes, strata = self._resolve(cell, epoch, np.arange(start, stop))
        return PlannedBatch(epoch=epoch, index=index, cell=cell, rows=rows, passes=passes, strata=strata)

    def _resolve(
        self, number: int, epoch: int, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows, passes and strata at positions of a cell."""
        cell = self.cells[number]
        # likewise the rows of a cell; a batch asks for its own positions alone
        places = permute(positions, cell.size, key_of(self.seed, epoch, "cell", number))
        own = np.flatnonzero(places < cell.num_own)
        rows, passes, strata = np.empty_like(places), np.empty_like(places), np.empty_like(places)
        if len(own):
            member = np.searchsorted(cell.stratum_ends, places[own], side="right")
            starts = cell.stratum_ends[member] - self._flat.served[list(cell.strata)][member]
            strata[own] = np.asarray(cell.strata)[member]
            rows[own], passes[own] = self._stratum_rows(strata[own], epoch, places[own] - starts)
        if len(own) < len(places):
            assert cell.carried is not None
            # rows that a smaller bucket could not place in whole batches ride along here
            rest = np.flatnonzero(places >= cell.num_own)
            found = self._resolve(cell.carried.cell, epoch, places[rest] - cell.num_own + cell.carried.start)
            rows[rest], passes[rest], strata[rest] = found
        return rows, passes, strata

    def _stratum_rows(
        self, strata: np.ndarray, epoch: int, positions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and passes at positions of several strata at once."""
        flat = self._flat
        passes, inside = np.divmod(positions, flat.num_rows[strata])
        for number in np.unique(strata[flat.is_partial[strata]]).tolist():
            # the last pass takes part of the rows: another part every epoch
            for turn in np.unique(passes[strata == number]).tolist():
                chosen = (strata == number) & (passes == turn)
                inside[chosen] = permute(
                    inside[chosen],
                    int(flat.num_rows[number]),
                    key_of(self.seed, epoch, "stratum", number, turn),
                )
        inside += flat.row_starts[strata]
        span = np.searchsorted(flat.range_ends, inside, side="right")
        return flat.range_lasts[span] - (flat.range_ends[span] - inside), passes


class _Flat:
    """The row ranges of all strata, one after the other: one search finds the rows of a whole batch."""

    def __init__(self, strata: Sequence[Stratum]):
        self.num_rows = np.asarray([stratum.num_rows for stratum in strata])
        self.served = np.asarray([stratum.num_served for stratum in strata])
        self.is_partial = self.served % self.num_rows != 0
        self.row_starts = np.cumsum(self.num_rows) - self.num_rows
        self.range_ends = np.concatenate(
            [stratum.ends + start for stratum, start in zip(strata, self.row_starts)]
        )
        counts = np.concatenate([np.diff(stratum.ends, prepend=0) for stratum in strata])
        self.range_lasts = np.concatenate([stratum.first_rows for stratum in strata]) + counts
        """First row after each range."""


def build_plan(config: DataConfig, datasets: Sequence[DatasetRows], seed: int) -> Plan:
    """Lay out the batches of an epoch.

    Raises:
        ConfigError: batch sizes or buckets that do not fit the data.
        DataError: no rows.
    """
    strata = build_strata(config, datasets)
    cells = build_cells(config, datasets, strata)
    return Plan(
        seed=seed,
        datasets=tuple(datasets),
        strata=tuple(strata),
        cells=tuple(cells),
        fingerprint=_fingerprint(config, datasets, strata, cells, seed),
    )


def _fingerprint(
    config: DataConfig,
    datasets: Sequence[DatasetRows],
    strata: Sequence[Stratum],
    cells: Sequence[Cell],
    seed: int,
) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    drawn = {
        name: getattr(config, name)
        for name in ("segment_shuffle_probability", "segment_shuffle_min_tokens", "pack_texts_tokens")
    }
    if config.positives_per_query > 1:
        # only then: runs from before the field existed go on
        drawn["positives_per_query"] = config.positives_per_query
    facts = {
        "seed": seed,
        "accumulation_steps": config.batch.accumulation_steps,
        "drawn": drawn,
        "datasets": [
            [d.name, d.in_batch_negatives, d.passages_per_query, d.is_text, d.first_row] for d in datasets
        ],
        "cells": [
            [c.group, c.max_tokens, list(c.strata), c.size, c.num_full, c.batch_queries, list(c.tails)]
            for c in cells
        ],
        "strata": [[s.dataset, s.language, s.bucket, s.num_rows, s.num_served] for s in strata],
    }
    hasher.update(json.dumps(facts, sort_keys=True).encode())
    for stratum in strata:
        hasher.update(np.asarray(stratum.first_rows, dtype="<i8").tobytes())
        hasher.update(np.asarray(stratum.ends, dtype="<i8").tobytes())
    return hasher.hexdigest()
