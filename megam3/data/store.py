"""The tokenised store on disk, and reading rows from it.

    STORE/
      DATASET/
        spec.json          tokenizer, limits, inputs and their cut into units: what the shards were made from
        shards/00000.arrow, .json, .rejects.jsonl     one per unit (shard.py)
        index.npy          8 bytes per row: what the plan balances ranks by
        runs.npy           rows per (shard, language, length): what the plan is built from
        rejected.jsonl     every refused record with its reason
        manifest.json      written last: counts, shard list with checksums, fingerprint

Opening reads manifest and runs; token ids are memory-mapped shard by shard when a row of theirs is wanted.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np

from megam3.data.manifest import INDEX_DTYPE, RUN_DTYPE, Manifest
from megam3.data.shard import Shard, StoredRow, checksum_of, corrupt
from megam3.errors import DataError

MAX_OPEN_SHARDS = 256
"""Each holds a file descriptor; 1024 is a common limit and the training process needs some."""


@dataclass(kw_only=True)
class StoredDataset:
    """One prepared dataset, opened for reading."""

    folder: Path
    manifest: Manifest
    index: np.ndarray
    """INDEX_DTYPE, one entry per row, memory-mapped."""
    runs: np.ndarray
    """RUN_DTYPE, ascending by first_row, memory-mapped."""
    shard_starts: np.ndarray
    """First row of each shard, and the number of rows."""
    _open: OrderedDict[int, Shard] = field(default_factory=OrderedDict)

    @property
    def num_rows(self) -> int:
        """Records."""
        return int(self.shard_starts[-1])

    @property
    def languages(self) -> list[str]:
        """By the codes used in `runs`."""
        return self.manifest.languages

    @property
    def is_text(self) -> bool:
        """Texts for pretraining rather than pairs."""
        return self.manifest.kind == "text"

    def shard_of(self, row: int) -> tuple[int, int]:
        """(shard, position in it) of a row."""
        shard = int(np.searchsorted(self.shard_starts, row, side="right")) - 1
        return shard, row - int(self.shard_starts[shard])

    def shard(self, number: int) -> Shard:
        """Shard `number`, mapped; the least recently used ones are closed."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        entry = self.manifest.shards[number]
        self._open[number] = Shard(self.folder / "shards" / entry.file, entry.bytes)
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]

    def row(self, row: int) -> StoredRow:
        """One record by its row number."""
        shard, position = self.shard_of(row)
        return self.shard(shard).row(position)

    def language_of(self, row: int) -> str:
        """Language of a row."""
        run = int(np.searchsorted(self.runs["first_row"], row, side="right")) - 1
        return self.languages[int(self.runs["language"][run])]


def dataset_folder(store_dir: str | Path, name: str) -> Path:
    """Where a dataset lives: a folder directly inside the store.

    Raises:
        DataError: a name that is no folder of its own.
    """
    if name in ("", ".", ".."):
        raise DataError("data.train[].name", name, "names no folder inside the store", "rename the dataset")
    return Path(store_dir) / quote(name, safe=" ")


def open_dataset(store_dir: str | Path, name: str) -> StoredDataset:
    """Open a prepared dataset.

    Raises:
        DataError: not prepared, unfinished, of another format, or damaged.
    """
    folder = dataset_folder(store_dir, name)
    manifest = Manifest.read(folder / "manifest.json")
    if manifest is None:
        remedy = "run `megam3 prepare` with this recipe first"
        raise DataError("data.store_dir", str(folder), "holds no finished dataset", remedy)
    try:
        index = np.load(folder / "index.npy", mmap_mode="r")
        runs = np.load(folder / "runs.npy", mmap_mode="r")
        if isinstance(index.base, mmap.mmap):
            # 8 bytes here and there: reading ahead would fetch 128 KB for each
            index.base.madvise(mmap.MADV_RANDOM)
    except (OSError, ValueError) as error:
        raise _damaged(folder / "index.npy", None, f"cannot be read ({error})") from error
    starts = np.cumsum([0, *(entry.rows for entry in manifest.shards)], dtype=np.int64)
    if index.dtype != INDEX_DTYPE or len(index) != starts[-1] or runs.dtype != RUN_DTYPE:
        raise _damaged(folder / "index.npy", str(len(index)), f"must describe {starts[-1]} rows")
    return StoredDataset(folder=folder, manifest=manifest, index=index, runs=runs, shard_starts=starts)


def verify_dataset(dataset: StoredDataset) -> None:
    """`verify_files` of an opened dataset."""
    verify_files(dataset.folder, dataset.manifest)


def verify_files(folder: Path, manifest: Manifest, num_threads: int = 1) -> int:
    """Read every file that batches come from and compare its checksum; returns the bytes read.

    The manifest, which has a checksum of its own, names those of index, runs and shards, so no column is left
    out. Hashing and reading leave the interpreter to others: threads read several files at a time.

    Raises:
        DataError: a file is damaged or missing; names the first one and what to do.
    """
    expected = {f"shards/{entry.file}": entry.checksum for entry in manifest.shards}
    named = {"index.npy": manifest.index_checksum, "runs.npy": manifest.runs_checksum}
    expected |= {file: checksum for file, checksum in named.items() if checksum is not None}

    def read(file: str) -> int:
        path = folder / file
        try:
            found = checksum_of(path)
        except OSError as error:
            raise _damaged(path, None, f"cannot be read ({error})") from error
        if found != expected[file]:
            raise _damaged(path, found, f"must have checksum {expected[file]}")
        return path.stat().st_size

    with ThreadPoolExecutor(num_threads) as threads:
        return sum(threads.map(read, expected))


def _damaged(path: Path, found: str | None, rule: str) -> DataError:
    if path.suffix == ".arrow":
        return corrupt(path, found, rule)
    remedy = "delete it with manifest.json and run `megam3 prepare` again: both are made anew from the shards"
    return DataError(f"store file {path}", found, rule, remedy)
