"""One unit of input → one shard: an Arrow file of token ids and a JSON file that says it is complete.

The rows of a shard are sorted by (language, tokens of the longest text), so a language and length bucket is one contiguous run of rows and
the plan needs no list of rows at all. Columns, one entry per record:

    texts                list<list<int32>>   [query, positives…, negatives…]; a text for pretraining is one list
    hashes               list<int64>         of each text as written in the input, instruction excluded
    truncated            list<uint8>         1 for a text cut at its limit
    scores               list<float32>       teacher scores of the passages, or empty
    num_positives        uint16              0 for a text for pretraining
    only_one_negative    uint8
    line                 int64               line (or row) within the unit, for tracing a sample to its source
    id_hash              int64               0: the record has no id
    checksum             uint32              CRC-32 of the row's token ids, checked on every read
    query_tokens, positive_tokens, negative_tokens, num_negatives   uint16   what the plan balances ranks by (means over the texts)
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from megam3.data.record import BadRecord, Record, parse_line, parse_record
from megam3.data.source import READ_BYTES, HugeLine, Unit, place, read_unit
from megam3.data.tokenizer import Tokenizer
from megam3.errors import DataError

RECORDS_PER_CALL = (
    256  # texts go to the tokenizer in groups: one call per text would cost as much as the tokenizing
)
INDEX_FIELDS = ("query_tokens", "positive_tokens", "negative_tokens", "num_negatives")


@dataclass(frozen=True)
class TextRules:
    """What turns a record into token ids; all of it is part of the store's fingerprint."""

    language: str
    query_instruction: str
    passage_instruction: str
    query_max_tokens: int
    passage_max_tokens: int


@dataclass
class Rejects:
    """Records refused so far, up to a limit."""

    unit: Unit
    limit: int
    """Refuse at most this many; the next one is an error. 0: the first bad record is an error."""
    lines: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    input_digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=16))
    """Running hash of everything read, to recognise the same input later."""

    def add(self, number: int, line: object, why: BadRecord) -> None:
        """Keep a refused record for the side file, or raise the DataError that stops the run."""
        if len(self.lines) >= self.limit:
            raise why.at(place(self.unit, number))
        text = line.decode("utf-8", "surrogateescape") if isinstance(line, bytes) else repr(line)
        kept = {
            "file": self.unit.path,
            "unit_start": self.unit.start,
            "line_in_unit": number,
            "reason": str(why),
            "record": text,
        }
        self.lines.append(json.dumps(kept) + "\n")
        self.reasons[f"{why.field.split('[')[0]}: {why.rule.split('(')[0].strip()}"] += 1


@dataclass
class EncodedRow:
    """One record as token ids."""

    texts: list[np.ndarray]
    truncated: list[bool]
    hashes: list[int]
    record: Record
    line: int
    language: str

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return max(map(len, self.texts))


def text_hash(text: str) -> int:
    """Stable signed 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def build_shard(
    unit: Unit,
    rules: TextRules,
    tokenizer: Tokenizer,
    folder: Path,
    name: str,
    limit: int,
    drop: frozenset[int],
) -> dict:
    """Prepare one unit: write `name`.arrow, its rejects if any, and last `name`.json, whose presence means that all is complete.

    Args:
        limit: bad records to skip before stopping.
        drop: lines to refuse as duplicates of an earlier record's id.

    Returns:
        The contents of `name`.json: counts, checksum and the runs of equal (language, longest text).

    Raises:
        DataError: a bad record beyond `limit`, an unreadable input, or a disk that does not take the shard.
    """
    rejects = Rejects(unit, limit)
    rows = list(_encode_rows(unit, rules, tokenizer, rejects, drop))
    rows.sort(key=lambda row: (row.language, row.longest, row.line))
    payload = _to_arrow(rows)
    summary = _summarise(rows, rejects, unit) | {
        "bytes": len(payload),
        "checksum": hashlib.blake2b(payload, digest_size=16).hexdigest(),
    }
    if rejects.lines:
        write_checked(folder / f"{name}.rejects.jsonl", ["".join(rejects.lines).encode()])
    write_checked(folder / f"{name}.arrow", [payload])
    write_checked(folder / f"{name}.json", [json.dumps(summary, sort_keys=True).encode()])
    return summary


def write_checked(path: Path, blocks: Iterable[bytes | memoryview]) -> None:
    """Write aside, read back, compare, rename: `path` is either absent or whole.

    Raises:
        DataError: no space, no permission, or the disk returned other bytes than were written.
    """
    aside = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        written = hashlib.blake2b(digest_size=16)
        with open(aside, "wb") as file:
            for block in blocks:
                file.write(block)
                written.update(block)
            file.flush()
            os.fsync(file.fileno())
        if file_digest(aside) != written.hexdigest():
            raise OSError("read back other bytes than were written")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        remedy = "make room or choose another data.store_dir; what is complete is kept, so start it again"
        raise DataError("store file", str(path), f"could not be written ({error})", remedy) from error


def file_digest(path: Path) -> str:
    """Checksum of a file's bytes, as kept for shards."""
    hasher = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def line_bytes(line: bytes | dict | HugeLine) -> bytes:
    """What the digest of an input hashes for one line or row."""
    if isinstance(line, HugeLine):
        return line.head + str(line.num_bytes).encode()
    return line if isinstance(line, bytes) else repr(line).encode("utf-8", "backslashreplace")


def input_digest(unit: Unit) -> str:
    """Digest of a unit as it is on disk now, equal to the one kept when it was prepared if nothing changed."""
    hasher = hashlib.blake2b(digest_size=16)
    for _, line in read_unit(unit):
        hasher.update(line_bytes(line))
    return hasher.hexdigest()


def _encode_rows(
    unit: Unit, rules: TextRules, tokenizer: Tokenizer, rejects: Rejects, drop: frozenset[int]
) -> Iterator[EncodedRow]:
    records = _checked_records(unit, rejects, drop)
    while block := list(islice(records, RECORDS_PER_CALL)):
        queries = [
            _instruct(record.prompt or rules.query_instruction, record.query)
            for _, record in block
            if record.query is not None
        ]
        passages = [
            _instruct(_passage_instruction(record, rules), text)
            for _, record in block
            for text in record.passages
        ]
        query_ids = iter(zip(*tokenizer.encode_marking(queries, rules.query_max_tokens), strict=True))
        passage_ids = iter(zip(*tokenizer.encode_marking(passages, rules.passage_max_tokens), strict=True))
        for number, record in block:
            own = [next(query_ids)] if record.query is not None else []
            own += islice(passage_ids, len(record.passages))
            raw = ([] if record.query is None else [record.query]) + list(record.passages)
            texts, truncated = [ids for ids, _ in own], [cut for _, cut in own]
            yield EncodedRow(
                texts,
                truncated,
                [text_hash(t) for t in raw],
                record,
                number,
                record.language or rules.language,
            )


def _passage_instruction(record: Record, rules: TextRules) -> str:
    return (
        (record.prompt or rules.query_instruction)
        if record.passages_are_queries
        else rules.passage_instruction
    )


def _instruct(instruction: str | None, text: str | None) -> str:
    # never format() an absent instruction: FlagEmbedding 1.4 puts the word "None" before every query that way
    assert text is not None
    return instruction + text if instruction else text


def _checked_records(unit: Unit, rejects: Rejects, drop: frozenset[int]) -> Iterator[tuple[int, Record]]:
    for number, line in read_unit(unit):
        rejects.input_digest.update(line_bytes(line))
        try:
            if isinstance(line, HugeLine):
                raise BadRecord("line", line.head[:40], f"is huge ({line.num_bytes} bytes)")
            record = parse_line(line) if isinstance(line, bytes) else parse_record(line)
            if number in drop:
                raise BadRecord("id", record.record_id, "is a duplicate: an earlier record has the same id")
        except BadRecord as why:
            rejects.add(number, line.head if isinstance(line, HugeLine) else line, why)
            continue
        yield number, record


def _nested(lists: list[list], kind: pa.DataType) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array([x for items in lists for x in items], kind))


def _to_arrow(rows: list[EncodedRow]) -> memoryview:
    texts = [text for row in rows for text in row.texts]
    token_offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    if token_offsets[-1] >= 2**31:
        raise DataError(
            "unit",
            int(token_offsets[-1]),
            "holds more tokens than a shard can (2 ** 31)",
            "prepare with smaller units",
        )
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
        "id_hash": pa.array(
            [0 if row.record.record_id is None else text_hash(row.record.record_id) or 1 for row in rows],
            pa.int64(),
        ),
        "checksum": pa.array([row_checksum(np.concatenate(row.texts)) for row in rows], pa.uint32()),
    }
    statistics = [_index_entry(row) for row in rows]
    for column, name in enumerate(INDEX_FIELDS):
        columns[name] = pa.array([entry[column] for entry in statistics], pa.uint16())
    batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return memoryview(sink.getvalue())


def row_checksum(tokens: np.ndarray) -> int:
    """CRC-32 of a row's token ids, all texts in order."""
    return zlib.crc32(np.ascontiguousarray(tokens).data)


def _index_entry(row: EncodedRow) -> tuple[int, int, int, int]:
    lengths, num_positives = [len(text) for text in row.texts], row.record.num_positives
    if row.record.query is None:
        return 0, lengths[0], 0, 0
    positives, negatives = lengths[1 : 1 + num_positives], lengths[1 + num_positives :]
    mean = round(sum(negatives) / len(negatives)) if negatives else 0
    usable = min(len(negatives), 1) if row.record.only_one_negative else len(negatives)
    return lengths[0], round(sum(positives) / len(positives)), mean, usable


def _summarise(rows: list[EncodedRow], rejects: Rejects, unit: Unit) -> dict:
    runs: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        run = runs.setdefault((row.language, row.longest), [0, 0])
        run[0], run[1] = run[0] + 1, run[1] + sum(map(len, row.texts))
    pairs = [row for row in rows if row.record.query is not None]
    without_scores = [row.line for row in pairs if not row.record.scores]
    first = {
        "pair": min((row.line for row in pairs), default=None),
        "text": min((row.line for row in rows if row.record.query is None), default=None),
        "pair_without_scores": min(without_scores, default=None),
    }
    return {
        "unit": [unit.path, unit.format, unit.start, unit.stop],
        "rows": len(rows),
        "texts": sum(len(row.texts) for row in rows),
        "tokens": sum(len(text) for row in rows for text in row.texts),
        "truncated": sum(sum(row.truncated) for row in rows),
        "with_ids": sum(row.record.record_id is not None for row in rows),
        "with_scores": len(pairs) - len(without_scores),
        "first": {kind: place(unit, line) for kind, line in first.items() if line is not None},
        "input_digest": rejects.input_digest.hexdigest(),
        "rejected": len(rejects.lines),
        "reasons": dict(sorted(rejects.reasons.items())),
        "runs": [[language, longest, *counts] for (language, longest), counts in runs.items()],
    }
