"""The passages of a test set on disk: a pool of their distinct texts, and which document has which.

    DOCUMENTS/  pool/            the texts, each once (pool.py); an empty one counts as a text here
                ids.bin          UTF-8 bytes of the documents' ids, one after another
                id_starts.npy    int64 [n + 1]
                pool_rows.npy    int32 [n]: row of document i's text in the pool

Several documents may have one text. It is encoded and searched once, and a hit stands for all of them:
pool row 7, which documents 3 and 9 have, becomes 3 and 9 with the same score. Rankings are then those of a
search over all documents, ties by place included.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import torch

from megam3.data.shard import text_hash
from megam3.errors import DataError
from megam3.files import atomic_folder
from megam3.retrieval.beir import repeated_id
from megam3.retrieval.index.pool import TextPool, open_pool, write_pool
from megam3.retrieval.topk import NO_ROW, Hits, sort_by_score


class _MappedStrings(Sequence[str]):
    """Strings that are read when they are asked for."""

    def __init__(self, starts: np.ndarray, blob: np.ndarray, rows: np.ndarray | None = None):
        self._starts, self._blob, self._rows = starts, blob, rows

    def __len__(self) -> int:
        return len(self._starts) - 1 if self._rows is None else len(self._rows)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        row = place % len(self) if self._rows is None else self._rows[place]
        return self._blob[self._starts[row] : self._starts[row + 1]].tobytes().decode("utf-8")


@dataclass(frozen=True, kw_only=True)
class Documents:
    """All documents, by place in the corpus."""

    pool: TextPool
    ids: Sequence[str]
    pool_rows: np.ndarray
    """int32 [n]: row in the pool of each document's text."""
    order: np.ndarray
    """Documents sorted by pool row, and by place within one."""
    starts: np.ndarray
    """int64 [rows + 1]: documents of pool row r are order[starts[r]] … order[starts[r+1]-1]."""

    def __len__(self) -> int:
        return len(self.pool_rows)

    @property
    def texts(self) -> Sequence[str]:
        """Of each document."""
        return _MappedStrings(self.pool.starts, self.pool.blob, self.pool_rows)

    @property
    def copies(self) -> np.ndarray:
        """int64 [rows]: how many documents have each text."""
        return np.diff(self.starts)

    def expand(self, hits: Hits, num_hits: int) -> Hits:
        """The best documents from the best rows of the pool; the best `num_hits` rows are enough for the best
        `num_hits` documents, because each row stands for at least one."""
        if len(self.pool) == len(self):
            return hits.first(num_hits)
        copies = self.copies
        parts = [
            self._expand_one(scores, rows, copies, num_hits)
            for scores, rows in zip(hits.scores_QK.numpy(), hits.rows_QK.numpy())
        ]
        width = max((part.rows_QK.shape[1] for part in parts), default=0)
        scores_QK = torch.full((len(parts), width), -torch.inf)
        rows_QK = torch.full((len(parts), width), NO_ROW, dtype=torch.int64)
        for query, part in enumerate(parts):
            scores_QK[query, : part.rows_QK.shape[1]] = part.scores_QK[0]
            rows_QK[query, : part.rows_QK.shape[1]] = part.rows_QK[0]
        return Hits(scores_QK, rows_QK)

    def _expand_one(
        self, scores_K: np.ndarray, rows_K: np.ndarray, copies: np.ndarray, num_hits: int
    ) -> Hits:
        kept = rows_K != NO_ROW
        scores_K, rows_K = scores_K[kept], rows_K[kept]
        # a text that thousands of documents have gives no more than the first `num_hits` of them
        counts = copies[rows_K].clip(max=num_hits)
        ends = np.cumsum(counts)
        place = np.arange(counts.sum()) + np.repeat(self.starts[rows_K] - (ends - counts), counts)
        documents = torch.from_numpy(self.order[place].astype(np.int64))[None]
        return sort_by_score(torch.from_numpy(np.repeat(scores_K, counts))[None], documents, num_hits)


def write_documents(records: Iterable[tuple[str, str]], folder: Path) -> Documents:
    """Write (id, text) of all documents; the folder appears when it is complete. 32 bytes of memory a
    document.

    Raises:
        DataError: an id twice, or no text at all.
    """
    with atomic_folder(folder) as aside:
        id_starts, id_hashes, hashes = array("q", [0]), array("q"), array("q")

        def texts() -> Iterator[str]:
            with (aside / "ids.bin").open("wb") as stream:
                for document, text in records:
                    id_starts.append(id_starts[-1] + stream.write(document.encode("utf-8")))
                    id_hashes.append(text_hash(document))
                    hashes.append(text_hash(text if text.strip() else ""))
                    yield text if text.strip() else ""

        pool = write_pool(texts(), aside / "pool", keep_empty=True)
        _refuse_repeated(aside / "ids.bin", np.asarray(id_starts), np.asarray(id_hashes))
        by_hash = np.argsort(pool.hashes)
        places = np.searchsorted(pool.hashes[by_hash], np.asarray(hashes))
        np.save(aside / "pool_rows.npy", by_hash[places].astype(np.int32))
        np.save(aside / "id_starts.npy", np.asarray(id_starts))
    return open_documents(folder)


def _refuse_repeated(ids: Path, starts: np.ndarray, hashes: np.ndarray) -> None:
    _, first = np.unique(hashes, return_index=True)
    if len(first) == len(hashes):
        return
    again = np.setdiff1d(np.arange(len(hashes)), first)[0]
    blob = np.memmap(ids, dtype=np.uint8, mode="r")
    name = blob[starts[again] : starts[again + 1]].tobytes().decode("utf-8")
    raise repeated_id(f"corpus.jsonl, passage {again + 1}", name)


def open_documents(folder: Path) -> Documents:
    """Map documents that were written.

    Raises:
        DataError: not there, or damaged.
    """
    pool = open_pool(folder / "pool")
    try:
        id_starts = np.load(folder / "id_starts.npy", mmap_mode="r")
        pool_rows = np.load(folder / "pool_rows.npy", mmap_mode="r")
        ids = np.memmap(folder / "ids.bin", dtype=np.uint8, mode="r")
        if len(id_starts) != len(pool_rows) + 1 or id_starts[-1] != len(ids):
            raise ValueError("its files do not belong together")
    except (OSError, EOFError, ValueError) as error:
        rule = f"holds no readable documents ({error})"
        raise DataError("documents", str(folder), rule, "remove the folder and start again") from error
    counts = np.bincount(pool_rows, minlength=len(pool))
    return Documents(
        pool=pool,
        ids=_MappedStrings(id_starts, ids),
        pool_rows=pool_rows,
        order=np.argsort(pool_rows, kind="stable"),
        starts=np.concatenate([[0], np.cumsum(counts)]),
    )
