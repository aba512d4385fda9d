"""One unit of input → one shard file, and a JSON file that says it is complete."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from megam3.data.manifest import FirstRecords, RowRun, ShardSummary, TextRules
from megam3.data.record import BadRecord, Record, parse_line, parse_record
from megam3.data.shard import EncodedRow, text_hash, to_arrow, write_checked
from megam3.data.source import MAX_LINE_BYTES, ForwardReader, HugeLine, Unit, place, read_unit
from megam3.data.tokenizer import Tokenizer

MAX_UNKNOWN_KEYS = 100
"""Different ones that are counted in a unit: keys that are data would fill the manifest."""
RECORDS_PER_CALL = 256
"""Texts go to the tokenizer in groups: one call per text would cost as much as the tokenizing."""


@dataclass(kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """One unit to prepare."""

    unit: Unit
    rules: TextRules
    folder: Path
    name: str
    """Of the shard's files, without suffix."""
    max_rejected: int
    """Bad records to skip before stopping."""
    drop: frozenset[int] = frozenset()
    """Lines to refuse as duplicates of an earlier record's id."""


def build_shard(job: ShardJob, tokenizer: Tokenizer, reader: ForwardReader | None = None) -> ShardSummary:
    """Prepare one unit: NAME.arrow, its rejects if any, and last NAME.json, which says that all is complete.
    Whoever prepares several units gives the same `reader` to each call.

    Returns:
        The contents of NAME.json: counts, checksum and the runs of equal (language, longest text).

    Raises:
        DataError: a bad record beyond the limit, an unreadable input, or a disk that does not take the shard.
    """
    rejects = Rejects(unit=job.unit, limit=job.max_rejected)
    rows = list(_encode_rows(job, tokenizer, rejects, reader))
    rows.sort(key=lambda row: (row.language, row.longest, row.line))
    payload = to_arrow(rows)
    summary = _summarise(rows, rejects, payload)
    if rejects.lines:
        write_checked(job.folder / f"{job.name}.rejects.jsonl", ["".join(rejects.lines).encode()])
    write_checked(job.folder / f"{job.name}.arrow", [payload])
    write_checked(job.folder / f"{job.name}.json", [summary.to_json()])
    return summary


def line_bytes(line: bytes | dict | HugeLine) -> bytes:
    """What the digest of an input hashes for one line or row."""
    if isinstance(line, HugeLine):
        return line.head + str(line.num_bytes).encode()
    return line if isinstance(line, bytes) else repr(line).encode("utf-8", "backslashreplace")


def input_digest(unit: Unit, reader: ForwardReader | None = None) -> str:
    """Digest of a unit as it is on disk now; equal to the summary's if nothing changed."""
    hasher = hashlib.blake2b(digest_size=16)
    for _, line in read_unit(unit, reader):
        hasher.update(line_bytes(line))
    return hasher.hexdigest()


def _encode_rows(
    job: ShardJob, tokenizer: Tokenizer, rejects: Rejects, reader: ForwardReader | None
) -> Iterator[EncodedRow]:
    rules = job.rules
    records = _checked_records(job, rejects, reader)
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
        for line, record in block:
            own = [next(query_ids)] if record.query is not None else []
            own += islice(passage_ids, len(record.passages))
            raw = ([] if record.query is None else [record.query]) + list(record.passages)
            yield EncodedRow(
                record=record,
                line=line,
                language=record.language or rules.language,
                texts=[ids for ids, _ in own],
                truncated=[cut for _, cut in own],
                hashes=[text_hash(text) for text in raw],
            )


def _passage_instruction(record: Record, rules: TextRules) -> str:
    if record.passages_are_queries:
        return record.prompt or rules.query_instruction
    return rules.passage_instruction


def _instruct(instruction: str | None, text: str | None) -> str:
    # never format() an absent instruction: FlagEmbedding 1.4 puts the word "None" before every query that way
    assert text is not None
    return instruction + text if instruction else text


def _checked_records(
    job: ShardJob, rejects: Rejects, reader: ForwardReader | None
) -> Iterator[tuple[int, Record]]:
    """(line within the unit, record) of every good record; the others go to `rejects`."""
    for number, line in read_unit(job.unit, reader):
        rejects.input_digest.update(line_bytes(line))
        try:
            if isinstance(line, HugeLine):
                raise BadRecord(
                    "line",
                    line.head[:40],
                    f"has {line.num_bytes} bytes, more than the {MAX_LINE_BYTES} of any record",
                )
            record = parse_line(line) if isinstance(line, bytes) else parse_record(line)
            if number in job.drop:
                raise BadRecord("id", record.record_id, "is a duplicate: an earlier record has the same id")
        except BadRecord as why:
            rejects.add(number, line.head if isinstance(line, HugeLine) else line, why)
            continue
        yield number, record


def _summarise(rows: Sequence[EncodedRow], rejects: Rejects, payload: memoryview) -> ShardSummary:
    runs: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        run = runs.setdefault((row.language, row.longest), [0, 0])
        run[0] += 1
        run[1] += row.num_tokens
    pairs = [row.line for row in rows if row.record.query is not None]
    texts = [row.line for row in rows if row.record.query is None]
    unscored = [row.line for row in rows if row.record.query is not None and not row.record.scores]
    return ShardSummary(
        unit=rejects.unit,
        rows=len(rows),
        texts=sum(len(row.texts) for row in rows),
        tokens=sum(row.num_tokens for row in rows),
        truncated=sum(sum(row.truncated) for row in rows),
        with_ids=sum(row.record.record_id is not None for row in rows),
        with_scores=len(pairs) - len(unscored),
        first=FirstRecords(
            pair=min(pairs, default=None),
            text=min(texts, default=None),
            pair_without_scores=min(unscored, default=None),
        ),
        input_digest=rejects.input_digest.hexdigest(),
        rejected=len(rejects.lines),
        reasons=dict(sorted(rejects.reasons.items())),
        unknown_keys=_unknown_keys(rows),
        runs=[RowRun(language, longest, *counts) for (language, longest), counts in runs.items()],
        bytes=len(payload),
        checksum=hashlib.blake2b(payload, digest_size=16).hexdigest(),
    )


def _unknown_keys(rows: Sequence[EncodedRow]) -> dict[str, int]:
    counts = Counter(key for row in rows for key in row.record.unknown_keys)
    return dict(sorted(counts.most_common(MAX_UNKNOWN_KEYS)))
