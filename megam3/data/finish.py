"""Finishing a dataset whose shards are complete: index, runs, merged rejects, manifest.

All of it is a function of the shard summaries in unit order, so any process that finds the shards complete
may write it: the bytes are the same.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from megam3.data.manifest import (
    INDEX_DTYPE,
    RUN_DTYPE,
    HistogramBar,
    LanguageTotals,
    Manifest,
    ShardEntry,
    ShardSummary,
    StoreSpec,
    Totals,
)
from megam3.data.shard import INDEX_FIELDS, Shard, write_checked
from megam3.data.source import place
from megam3.errors import DataError
from megam3.files import is_abandoned

MAX_LANGUAGES = 1 << 16
"""Their codes have 16 bits in runs.npy; the world has some 7 000."""
IDS_PER_PASS = 1 << 24
"""128 MB of id hashes at a time while looking for duplicates."""


def finish_dataset(folder: Path, name: str, spec: StoreSpec, summaries: Sequence[ShardSummary]) -> Manifest:
    """Write everything that needs all shards, the manifest last; returns the manifest.

    Raises:
        DataError: no usable record; pairs and texts mixed; teacher scores in some pairs only; more languages
            than there are; a full disk.
    """
    kind = _check_kind(folder, name, summaries)
    _check_scores(name, summaries)
    languages = sorted({run.language for summary in summaries for run in summary.runs})
    if len(languages) > MAX_LANGUAGES:
        rule = (
            f"holds more than {MAX_LANGUAGES} different values of `lang`, which no collection of texts does"
        )
        remedy = "give each record a code of its language, such as de, or leave `lang` out"
        raise DataError(f"dataset {name} lang", f"{len(languages)} languages", rule, remedy)
    index_checksum = write_checked(folder / "index.npy", _index_blocks(folder, summaries))
    runs = _runs(summaries, languages)
    runs_checksum = write_checked(folder / "runs.npy", [_npy_header(runs.dtype, len(runs)), runs.tobytes()])
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
        index_checksum=index_checksum,
        runs_checksum=runs_checksum,
    ).sealed()
    manifest.write(folder)
    remove_abandoned(folder)
    return manifest


def remove_abandoned(folder: Path) -> None:
    """Delete what ended processes left half-written; other tasks of an array may still be writing theirs."""
    for leftover in filter(is_abandoned, [*folder.glob("*.tmp"), *folder.glob("shards/*.tmp")]):
        leftover.unlink(missing_ok=True)


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
    pair, text = _first_place(summaries, "pair"), _first_place(summaries, "text")
    if pair and text:
        rule = f"mixes pairs (first at {pair}) and texts (first at {text})"
        raise DataError(f"dataset {name}", "pairs and texts", rule, "make two datasets of it")
    if not pair and not text:
        rejected = sum(summary.rejected for summary in summaries)
        remedy = f"see {folder}/shards/*.rejects.jsonl for the reasons"
        remedy = remedy if rejected else "its files are empty; correct the paths"
        raise DataError(f"dataset {name}", f"{rejected} records rejected", "holds no usable record", remedy)
    return "pair" if pair else "text"


def _first_place(summaries: Sequence[ShardSummary], kind: str) -> str | None:
    """`file:line` of the first record of a kind; None when there is none."""
    for summary in summaries:
        line = getattr(summary.first, kind)
        if line is not None:
            return line if isinstance(line, str) else place(summary.unit, line)
    return None


def _check_scores(name: str, summaries: Sequence[ShardSummary]) -> None:
    with_scores = sum(summary.with_scores for summary in summaries)
    without = _first_place(summaries, "pair_without_scores") if with_scores else None
    if without:
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
