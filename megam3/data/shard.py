"""A shard: one Arrow file of token ids, the rows of one unit of input.

The rows of a shard are sorted by (language, tokens of the longest text), so a language and length bucket is
one contiguous run of rows and the plan needs no list of rows at all. Columns, one entry per record:

    texts                list<list<int32>>   [query, positives…, negatives…]; a pretraining text is one list
    hashes               list<int64>         of each text as written in the input, instruction excluded
    truncated            list<uint8>         1 for a text cut at its limit
    scores               list<float32>       teacher scores of the passages, or empty
    num_positives        uint16              0 for a text for pretraining
    only_one_negative    uint8
    line                 int64               line (or row) within the unit, for tracing a sample to its source
    id_hash              int64               0: the record has no id
    checksum             uint32              CRC-32 of the row's token ids, checked on every read
    query_tokens, positive_tokens, negative_tokens, num_negatives
                         uint16              what the plan balances ranks by (means over the texts)
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from megam3.data.record import Record
from megam3.data.source import READ_BYTES
from megam3.errors import DataError
from megam3.files import atomic_file

INDEX_FIELDS = ("query_tokens", "positive_tokens", "negative_tokens", "num_negatives")
PLAIN_COLUMNS = ("num_positives", "only_one_negative", "line", "id_hash", "checksum", *INDEX_FIELDS)


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """One record as token ids, before it is written."""

    record: Record
    line: int
    language: str
    texts: list[np.ndarray]
    """int32: the query, then positives, then negatives."""
    truncated: list[bool]
    hashes: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.texts))

    @property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return sum(map(len, self.texts))

    def index_entry(self) -> tuple[int, int, int, int]:
        """INDEX_FIELDS of the row."""
        lengths, num_positives = [len(text) for text in self.texts], self.record.num_positives
        if self.record.query is None:
            return 0, lengths[0], 0, 0
        positives, negatives = lengths[1 : 1 + num_positives], lengths[1 + num_positives :]
        mean = round(sum(negatives) / len(negatives)) if negatives else 0
        usable = min(len(negatives), 1) if self.record.only_one_negative else len(negatives)
        return lengths[0], round(sum(positives) / len(positives)), mean, usable


@dataclass(frozen=True, kw_only=True)
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
        self._lists = {
            name: (batch.column(name).offsets.to_numpy(), batch.column(name).values.to_numpy())
            for name in ("hashes", "truncated", "scores")
        }
        self.columns = {name: batch.column(name).to_numpy() for name in PLAIN_COLUMNS}
        self.num_rows = batch.num_rows

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
            tokens=tokens,
            offsets=bounds - bounds[0],
            hashes=self._list("hashes", position),
            truncated=self._list("truncated", position),
            scores=self._list("scores", position),
            num_positives=int(self.columns["num_positives"][position]),
            only_one_negative=bool(self.columns["only_one_negative"][position]),
        )


def corrupt(path: Path, value: object, rule: str) -> DataError:
    """The error for a shard that changed after it was written."""
    return DataError(
        f"store file {path}",
        value,
        rule,
        f"delete it with its .json and the dataset's manifest.json and run `megam3 prepare` again; only "
        f"{path.stem} is redone",
    )


def text_hash(text: str) -> int:
    """Stable signed 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def row_checksum(tokens: np.ndarray) -> int:
    """CRC-32 of a row's token ids, all texts in order."""
    return zlib.crc32(np.ascontiguousarray(tokens).data)


def _id_hash(record_id: str | None) -> int:
    return 0 if record_id is None else text_hash(record_id) or 1


def _nested(lists: list[list], kind: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array([x for items in lists for x in items], kind))


def to_arrow(rows: Sequence[EncodedRow]) -> memoryview:
    """The bytes of a shard file.

    Raises:
        DataError: more tokens than 32-bit offsets reach.
    """
    texts = [text for row in rows for text in row.texts]
    token_offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    if token_offsets[-1] >= 2**31:
        rule = "holds more tokens than a shard can (2 ** 31)"
        raise DataError("unit", int(token_offsets[-1]), rule, "prepare with smaller units")
    tokens = np.concatenate(texts) if texts else np.zeros(0, np.int32)
    text_lists = pa.ListArray.from_arrays(pa.array(token_offsets.astype(np.int32)), pa.array(tokens))
    row_offsets = pa.array(np.cumsum([0, *(len(row.texts) for row in rows)], dtype=np.int32))
    columns: dict[str, pa.Array] = {
        "texts": pa.ListArray.from_arrays(row_offsets, text_lists),
        "hashes": _nested([row.hashes for row in rows], pa.int64()),
        "truncated": _nested([row.truncated for row in rows], pa.bool_()).cast(pa.list_(pa.uint8())),
        "scores": _nested([list(row.record.scores) for row in rows], pa.float32()),
        "num_positives": pa.array([row.record.num_positives for row in rows], pa.uint16()),
        "only_one_negative": pa.array([int(row.record.only_one_negative) for row in rows], pa.uint8()),
        "line": pa.array([row.line for row in rows], pa.int64()),
        "id_hash": pa.array([_id_hash(row.record.record_id) for row in rows], pa.int64()),
        "checksum": pa.array([row_checksum(np.concatenate(row.texts)) for row in rows], pa.uint32()),
    }
    entries = np.array([row.index_entry() for row in rows], np.uint16).reshape(-1, len(INDEX_FIELDS))
    columns |= {name: pa.array(entries[:, column]) for column, name in enumerate(INDEX_FIELDS)}
    batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def write_checked(path: Path, blocks: Iterable[bytes | memoryview]) -> str:
    """Write aside, read back, compare, rename: `path` is either absent or whole. Returns its `checksum_of`.

    Raises:
        DataError: no space, no permission, or the disk returned other bytes than were written.
    """
    written = hashlib.blake2b(digest_size=16)
    try:
        with atomic_file(path) as file:
            for block in blocks:
                file.write(block)
                written.update(block)
            file.flush()
            if checksum_of(Path(file.name)) != written.hexdigest():
                raise OSError("read back other bytes than were written")
    except OSError as error:
        remedy = "make room or choose another data.store_dir; what is complete is kept, so start it again"
        raise DataError("store file", str(path), f"could not be written ({error})", remedy) from error
    return written.hexdigest()


def checksum_of(path: Path) -> str:
    """Checksum of a file's bytes, as the manifest keeps it for shards."""
    hasher = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            hasher.update(block)
    return hasher.hexdigest()
