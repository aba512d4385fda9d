"""The JSON documents of a store, and finishing a dataset: index, runs, merged rejects, manifest.

    spec.json           StoreSpec       what the shards are made from; written first
    shards/00000.json   ShardSummary    one per unit; its presence means that the shard is complete
    manifest.json       Manifest        written last; its presence means that the dataset is complete

Every output of finishing is a function of the shard summaries in unit order, so any process that finds all
shards complete may write it: the bytes are the same. Field names are the keys on disk.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from pydantic import BaseModel, ConfigDict

from megam3.data.shard import INDEX_FIELDS, Shard, write_checked
from megam3.data.source import Unit
from megam3.errors import DataError
from megam3.files import is_abandoned

FORMAT = 1
INDEX_DTYPE = np.dtype([(name, "<u2") for name in INDEX_FIELDS])
RUN_DTYPE = np.dtype(
    [("first_row", "<i8"), ("num_rows", "<i8"), ("tokens", "<i8"), ("language", "<u2"), ("longest", "<u2")]
)
IDS_PER_PASS = 1 << 24
"""128 MB of id hashes at a time while looking for duplicates."""


class Document(BaseModel):
    """A typed JSON file, or a part of one. What is None is left out on disk."""

    model_config = ConfigDict(frozen=True)

    def to_json(self, indent: int | None = None) -> bytes:
        """Its bytes on disk; equal documents give equal bytes."""
        return json.dumps(
            self.model_dump(mode="json", exclude_none=True), sort_keys=True, indent=indent
        ).encode()

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """The document in a file, or None when it is not there.

        Raises:
            DataError: it is there but cannot be read, or is of another format.
        """
        try:
            found: Any = json.loads(path.read_bytes())
            if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
                rule = f"this version reads format {FORMAT}"
                raise DataError("store format", found["format"], rule, "prepare the data again")
            return cls.model_validate(found)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DataError:
            raise
        except (OSError, ValueError) as error:
            rule = f"cannot be read ({error})"
            remedy = "delete the dataset's folder and prepare it again"
            raise DataError("store file", str(path), rule, remedy) from error


class InputFile(NamedTuple):
    """What an input looked like when its dataset was begun."""

    num_bytes: int
    modified_ns: int


class RowRun(NamedTuple):
    """Neighbouring rows of a shard of equal language and tokens of the longest text."""

    language: str
    longest: int
    num_rows: int
    tokens: int


class TextRules(Document):
    """What turns a record into token ids; all of it is part of the store's fingerprint."""

    language: str
    query_instruction: str
    passage_instruction: str
    query_max_tokens: int
    passage_max_tokens: int


class StoreSpec(TextRules):
    """What a dataset's shards are made from."""

    format: int = FORMAT
    tokenizer: str
    """The tokenizer's fingerprint."""
    inputs: dict[str, InputFile]
    unit_bytes: int
    units: list[Unit]

    def rules(self) -> TextRules:
        """The part that a worker needs."""
        return TextRules(**{name: getattr(self, name) for name in TextRules.model_fields})


class FirstRecords(Document):
    """`file:line` of the first record of each kind, for messages."""

    pair: str | None = None
    text: str | None = None
    pair_without_scores: str | None = None


class ShardSummary(Document):
    """What is known of a complete shard without opening it."""

    unit: Unit
    rows: int
    texts: int
    tokens: int
    truncated: int
    """Texts cut at their limit."""
    with_ids: int
    with_scores: int
    first: FirstRecords
    input_digest: str
    rejected: int
    reasons: dict[str, int]
    unknown_keys: dict[str, int] = {}
    """Rows that hold a key that is not read, by key."""
    runs: list[RowRun]
    bytes: int
    checksum: str


class ShardEntry(Document):
    """One shard in the manifest."""

    file: str
    rows: int
    bytes: int
    checksum: str
    input_digest: str


class Totals(Document):
    """Sums over all shards."""

    rows: int
    texts: int
    tokens: int
    truncated: int
    rejected: int
    with_ids: int
    with_scores: int
    bytes: int
    reasons: dict[str, int]
    unknown_keys: dict[str, int] = {}
    """Rows that hold a key that is not read, by key; empty too in stores from before they were counted."""


class LanguageTotals(Document):
    """Sums over one language."""

    rows: int
    tokens: int


class HistogramBar(NamedTuple):
    """Rows whose longest text has at most `edge` tokens and more than the edge before."""

    edge: int
    num_rows: int


class Manifest(Document):
    """A finished dataset."""

    format: int = FORMAT
    name: str
    kind: Literal["pair", "text"]
    spec: StoreSpec
    languages: list[str]
    """By the codes used in runs.npy."""
    shards: list[ShardEntry]
    totals: Totals
    per_language: dict[str, LanguageTotals]
    length_histogram: list[HistogramBar]
    fingerprint: str


def finish_dataset(folder: Path, name: str, spec: StoreSpec, summaries: Sequence[ShardSummary]) -> Manifest:
    """Write everything that needs all shards, the manifest last; returns the manifest.

    Raises:
        DataError: no usable record; pairs and texts mixed; teacher scores in some pairs only; a full disk.
    """
    kind = _check_kind(folder, name, summaries)
    _check_scores(name, summaries)
    languages = sorted({run.language for summary in summaries for run in summary.runs})
    write_checked(folder / "index.npy", _index_blocks(folder, summaries))
    runs = _runs(summaries, languages)
    write_checked(folder / "runs.npy", [_npy_header(runs.dtype, len(runs)), runs.tobytes()])
    _merge_rejects(folder, len(summaries))
    manifest = Manifest(
        name=name,
        kind=kind,
        spec=spec,
        languages=languages,
        shards=[
            ShardEntry(
                file=f"{number:05d}.arrow",
                rows=summary.rows,
                bytes=summary.bytes,
                checksum=summary.checksum,
                input_digest=summary.input_digest,
            )
            for number, summary in enumerate(summaries)
        ],
        totals=_totals(summaries),
        per_language=_per_language(runs, languages),
        length_histogram=_histogram(runs),
        fingerprint=_fingerprint(summaries),
    )
    write_checked(folder / "manifest.json", [manifest.to_json(indent=1)])
    # of runs that were killed; other tasks of an array may still be writing theirs
    for leftover in filter(is_abandoned, [*folder.glob("*.tmp"), *folder.glob("shards/*.tmp")]):
        leftover.unlink(missing_ok=True)
    return manifest


def duplicate_lines(folder: Path, summaries: Sequence[ShardSummary]) -> dict[int, list[int]]:
    """Per unit, the lines whose record id an earlier line already has.

    Ids are compared range by range: memory stays bounded.
    """
    with_ids = sum(summary.with_ids for summary in summaries)
    found: dict[int, list[int]] = {}
    for part in range(-(-with_ids // IDS_PER_PASS)):
        num_parts = -(-with_ids // IDS_PER_PASS)
        ids, units, lines = (np.concatenate(x) for x in zip(*_ids(folder, summaries, part, num_parts)))
        order = np.lexsort((lines, units, ids))
        repeated = order[1:][ids[order][1:] == ids[order][:-1]]
        for unit, line in zip(units[repeated].tolist(), lines[repeated].tolist()):
            found.setdefault(unit, []).append(line)
    return {unit: sorted(lines) for unit, lines in sorted(found.items())}


def _ids(
    folder: Path, summaries: Sequence[ShardSummary], part: int, num_parts: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for unit, summary in enumerate(summaries):
        if summary.with_ids:
            columns = Shard(folder / "shards" / f"{unit:05d}.arrow", summary.bytes).columns
            chosen = np.flatnonzero(
                (columns["id_hash"] != 0)
                & (columns["id_hash"].view(np.uint64) % np.uint64(num_parts) == part)
            )
            yield columns["id_hash"][chosen], np.full(len(chosen), unit), columns["line"][chosen]


def _check_kind(folder: Path, name: str, summaries: Sequence[ShardSummary]) -> Literal["pair", "text"]:
    pair = next((summary.first.pair for summary in summaries if summary.first.pair), None)
    text = next((summary.first.text for summary in summaries if summary.first.text), None)
    if pair and text:
        rule = f"mixes pairs (first at {pair}) and texts (first at {text})"
        raise DataError(f"dataset {name}", "pairs and texts", rule, "make two datasets of it")
    if not pair and not text:
        rejected = sum(summary.rejected for summary in summaries)
        remedy = f"see {folder}/shards/*.rejects.jsonl for the reasons"
        remedy = remedy if rejected else "its files are empty; correct the paths"
        raise DataError(f"dataset {name}", f"{rejected} records rejected", "holds no usable record", remedy)
    return "pair" if pair else "text"


def _check_scores(name: str, summaries: Sequence[ShardSummary]) -> None:
    with_scores = sum(summary.with_scores for summary in summaries)
    without = next((s.first.pair_without_scores for s in summaries if s.first.pair_without_scores), None)
    if with_scores and without:
        rule = f"has teacher scores in {with_scores} records but not in all (first without: {without})"
        remedy = "score every record of the dataset, or make two datasets of it"
        raise DataError(f"dataset {name} pos_scores", None, rule, remedy)


def _index_blocks(folder: Path, summaries: Sequence[ShardSummary]) -> Iterator[bytes]:
    """index.npy shard by shard: 8 bytes a row are too many to hold for a billion rows.

    Not through np.lib.format.open_memmap: writing into a mapped file on a full disk kills the process with
    SIGBUS, where a stream raises the error that the user needs to read.
    """
    yield _npy_header(INDEX_DTYPE, sum(summary.rows for summary in summaries))
    for unit, summary in enumerate(summaries):
        columns = Shard(folder / "shards" / f"{unit:05d}.arrow", summary.bytes).columns
        block = np.empty(summary.rows, INDEX_DTYPE)
        for field in INDEX_FIELDS:
            block[field] = columns[field]
        yield block.tobytes()


def _npy_header(dtype: np.dtype, num_rows: int) -> bytes:
    sink = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (num_rows,)}
    np.lib.format.write_array_header_1_0(sink, facts)
    return sink.getvalue()


def _runs(summaries: Sequence[ShardSummary], languages: list[str]) -> np.ndarray:
    code = {language: number for number, language in enumerate(languages)}
    entries = [(code[run.language], *run[1:]) for summary in summaries for run in summary.runs]
    runs = np.empty(len(entries), RUN_DTYPE)
    for column, field in enumerate(("language", "longest", "num_rows", "tokens")):
        runs[field] = [entry[column] for entry in entries]
    runs["first_row"] = np.cumsum(runs["num_rows"]) - runs["num_rows"]
    return runs


def _merge_rejects(folder: Path, num_units: int) -> None:
    parts = [folder / "shards" / f"{unit:05d}.rejects.jsonl" for unit in range(num_units)]
    if any(part.is_file() for part in parts):
        write_checked(folder / "rejected.jsonl", (part.read_bytes() for part in parts if part.is_file()))


def _totals(summaries: Sequence[ShardSummary]) -> Totals:
    tables = ("reasons", "unknown_keys")
    names = [name for name in Totals.model_fields if name not in tables]
    sums = {name: sum(getattr(summary, name) for summary in summaries) for name in names}
    joined = {name: _joined([getattr(summary, name) for summary in summaries]) for name in tables}
    return Totals(**sums, **joined)


def _joined(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return dict(sorted(sum((Counter(count) for count in counts), Counter[str]()).items()))


def _per_language(runs: np.ndarray, languages: list[str]) -> dict[str, LanguageTotals]:
    rows, tokens = (
        np.bincount(runs["language"], weights=runs[field], minlength=len(languages)).astype(int).tolist()
        for field in ("num_rows", "tokens")
    )
    return {language: LanguageTotals(rows=rows[i], tokens=tokens[i]) for i, language in enumerate(languages)}


def _histogram(runs: np.ndarray) -> list[HistogramBar]:
    """Edges double from 16."""
    edges = [16 << i for i in range(13)]
    bars = np.searchsorted(edges, runs["longest"])
    counts = np.bincount(bars, weights=runs["num_rows"], minlength=len(edges)).astype(int).tolist()
    return [HistogramBar(edge, count) for edge, count in zip(edges, counts)]


def _fingerprint(summaries: Sequence[ShardSummary]) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for summary in summaries:
        hasher.update(f"{summary.rows} {summary.checksum}\n".encode())
    return hasher.hexdigest()
