"""All known positives of every query, over all records and files that hold it: none of them may become its
negative."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megam3.data.record import Record
from megam3.data.shard import text_hash
from megam3.files import atomic_file


class KnownPositives:
    """Pairs (hash of a query, hash of a positive), sorted: 16 bytes a pair, memory-mapped."""

    def __init__(self, pairs_K2: np.ndarray):
        self._pairs = pairs_K2

    def __len__(self) -> int:
        return len(self._pairs)

    def of(self, query_hash: int) -> np.ndarray:
        """Hashes of the query's positives, ascending."""
        queries = self._pairs[:, 0]
        first = int(np.searchsorted(queries, query_hash, "left"))
        last = int(np.searchsorted(queries, query_hash, "right"))
        return self._pairs[first:last, 1]


def write_known_positives(records: Iterable[Record], file: Path) -> None:
    """Collect the pairs of all records into `file` (.npy); a query is its text, wherever it stands."""
    flat = array("q")
    for record in records:
        assert record.query is not None
        query = text_hash(record.query)
        for passage in record.passages[: record.num_positives]:
            flat.extend((query, text_hash(passage)))
    pairs = np.frombuffer(flat, dtype=np.int64).reshape(-1, 2)
    with atomic_file(file) as stream:
        np.save(stream, np.unique(pairs, axis=0))


def open_known_positives(file: Path) -> KnownPositives:
    """Map what `write_known_positives` wrote."""
    return KnownPositives(np.load(file, mmap_mode="r"))
