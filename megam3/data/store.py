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

import json
import mmap
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from megam3.data.shard import INDEX_FIELDS, file_digest, row_checksum
from megam3.errors import DataError

FORMAT = 1
INDEX_DTYPE = np.dtype([(name, "<u2") for name in INDEX_FIELDS])
RUN_DTYPE = np.dtype(
    [("first_row", "<i8"), ("num_rows", "<i8"), ("tokens", "<i8"), ("language", "<u2"), ("longest", "<u2")]
)
MAX_OPEN_SHARDS = (
    256  # each holds a file descriptor; 1024 is a common limit and the training process needs some
)


@dataclass(frozen=True)
class StoredRow:
    """One record as token ids, read from a shard. Arrays are views of the file."""

    tokens: np.ndarray
    """int32, all texts joined: the query first, then positives, then negatives."""
    offsets: np.ndarray
    """Start of each text in `tokens`, and their end."""
    hashes: np.ndarray
    truncated: np.ndarray
    scores: np.ndarray
    num_positives: int
    only_one_negative: bool

    def text(self, index: int) -> np.ndarray:
        """Token ids of one text."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


class Shard:
    """One memory-mapped shard file."""

    def __init__(self, path: Path, num_bytes: int):
        self.path = path
        if not path.is_file() or path.stat().st_size != num_bytes:
            found = path.stat().st_size if path.is_file() else None
            raise corrupt(path, found, f"must be a file of {num_bytes} bytes")
        try:
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except pa.ArrowException as error:
            raise corrupt(path, None, f"is no Arrow file any more ({error})") from error
        texts = batch.column("texts")
        self._row_offsets = texts.offsets.to_numpy()
        self._token_offsets = texts.values.offsets.to_numpy()
        self._tokens = texts.values.values.to_numpy()
        self._lists = {name: self._flat(batch.column(name)) for name in ("hashes", "truncated", "scores")}
        self.columns = {
            name: batch.column(name).to_numpy()
            for name in ("num_positives", "only_one_negative", "line", "id_hash", "checksum", *INDEX_FIELDS)
        }
        self.num_rows = batch.num_rows

    @staticmethod
    def _flat(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
        return column.offsets.to_numpy(), column.values.to_numpy()

    def _list(self, name: str, position: int) -> np.ndarray:
        offsets, values = self._lists[name]
        return values[offsets[position] : offsets[position + 1]]

    def row(self, position: int) -> StoredRow:
        """Row `position`, its checksum verified.

        Raises:
            DataError: the bytes on disk are not those that were written.
        """
        bounds = self._token_offsets[self._row_offsets[position] : self._row_offsets[position + 1] + 1]
        tokens = self._tokens[bounds[0] : bounds[-1]]
        if row_checksum(tokens) != self.columns["checksum"][position]:
            raise corrupt(self.path, position, "is a row whose checksum does not match")
        return StoredRow(
            tokens,
            bounds - bounds[0],
            self._list("hashes", position),
            self._list("truncated", position),
            self._list("scores", position),
            int(self.columns["num_positives"][position]),
            bool(self.columns["only_one_negative"][position]),
        )


def corrupt(path: Path, value: object, rule: str) -> DataError:
    """The error for a shard that changed after it was written."""
    return DataError(
        f"store file {path}",
        value,
        rule,
        f"delete it with its .json and run `megam3 prepare` again; only {path.stem} is redone",
    )


@dataclass
class StoredDataset:
    """One prepared dataset, opened for reading."""

    folder: Path
    manifest: dict
    index: np.ndarray
    """INDEX_DTYPE, one entry per row, memory-mapped."""
    runs: np.ndarray
    """RUN_DTYPE, ascending by first_row, memory-mapped."""
    _shard_starts: np.ndarray
    _open: OrderedDict[int, Shard] = field(default_factory=OrderedDict)

    @property
    def num_rows(self) -> int:
        """Records."""
        return int(self._shard_starts[-1])

    @property
    def languages(self) -> list[str]:
        """By the codes used in `runs`."""
        return self.manifest["languages"]

    @property
    def is_text(self) -> bool:
        """Texts for pretraining rather than pairs."""
        return self.manifest["kind"] == "text"

    def shard_of(self, row: int) -> tuple[int, int]:
        """(shard, position in it) of a row."""
        shard = int(np.searchsorted(self._shard_starts, row, side="right")) - 1
        return shard, row - int(self._shard_starts[shard])

    def shard(self, number: int) -> Shard:
        """Shard `number`, mapped; the least recently used ones are closed."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        entry = self.manifest["shards"][number]
        self._open[number] = Shard(self.folder / "shards" / entry["file"], entry["bytes"])
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
    """Where a dataset lives; any name makes a valid folder."""
    return Path(store_dir) / quote(name, safe=" ")


def read_json(path: Path) -> dict | None:
    """A JSON file, or None when it is not there.

    Raises:
        DataError: it is there but cannot be read.
    """
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DataError(
            "store file",
            str(path),
            f"cannot be read ({error})",
            "delete the dataset's folder and prepare it again",
        ) from error


def open_dataset(store_dir: str | Path, name: str) -> StoredDataset:
    """Open a prepared dataset.

    Raises:
        DataError: not prepared, unfinished, of another format, or damaged.
    """
    folder = dataset_folder(store_dir, name)
    manifest = read_json(folder / "manifest.json")
    if manifest is None:
        raise DataError(
            "data.store_dir",
            str(folder),
            "holds no finished dataset",
            "run `megam3 prepare` with this recipe first",
        )
    if manifest["format"] != FORMAT:
        raise DataError(
            "store format",
            manifest["format"],
            f"this version reads format {FORMAT}",
            "prepare the data again",
        )
    try:
        index = np.load(folder / "index.npy", mmap_mode="r")
        runs = np.load(folder / "runs.npy", mmap_mode="r")
        if isinstance(index.base, mmap.mmap):
            index.base.madvise(
                mmap.MADV_RANDOM
            )  # 8 bytes here and there: reading ahead would fetch 128 KB for each
    except (OSError, ValueError) as error:
        raise corrupt(folder / "index.npy", None, f"cannot be read ({error})") from error
    starts = np.cumsum([0, *(entry["rows"] for entry in manifest["shards"])], dtype=np.int64)
    if index.dtype != INDEX_DTYPE or len(index) != starts[-1] or runs.dtype != RUN_DTYPE:
        raise corrupt(folder / "index.npy", len(index), f"must describe {starts[-1]} rows")
    return StoredDataset(folder, manifest, index, runs, starts)


def verify_dataset(dataset: StoredDataset) -> None:
    """Read every shard through and compare its checksum.

    Raises:
        DataError: a shard is damaged; the message names it.
    """
    for entry in dataset.manifest["shards"]:
        path = dataset.folder / "shards" / entry["file"]
        try:
            found = file_digest(path)
        except OSError as error:
            raise corrupt(path, None, f"cannot be read ({error})") from error
        if found != entry["checksum"]:
            raise corrupt(path, found, f"must have checksum {entry['checksum']}")
