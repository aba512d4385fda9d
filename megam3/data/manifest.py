"""From finished shards to a finished dataset: index, runs, merged rejects and the manifest that makes it visible.

Every output is a function of the shard summaries in unit order, so any process that finds all shards complete may write it: the bytes are
the same.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megam3.data.shard import INDEX_FIELDS, write_checked
from megam3.data.store import FORMAT, INDEX_DTYPE, RUN_DTYPE, Shard
from megam3.errors import DataError

IDS_PER_PASS = 1 << 24  # 128 MB of id hashes at a time while looking for duplicates


def finish_dataset(folder: Path, name: str, spec: dict, summaries: list[dict]) -> dict:
    """Write everything that needs all shards, the manifest last; returns the manifest.

    Raises:
        DataError: no usable record; pairs and texts mixed; teacher scores in some pairs only; a full disk.
    """
    kind = _check_kind(folder, name, summaries)
    _check_scores(name, summaries)
    languages = sorted({run[0] for summary in summaries for run in summary["runs"]})
    _write_index(folder, summaries)
    runs = _runs(summaries, languages)
    write_checked(
        folder / "runs.npy", [_npy_header(np.lib.format.header_data_from_array_1_0(runs)), runs.tobytes()]
    )
    _merge_rejects(folder, len(summaries))
    manifest = {
        "format": FORMAT,
        "name": name,
        "kind": kind,
        "spec": spec,
        "languages": languages,
        "shards": [
            {"file": f"{i:05d}.arrow"}
            | {key: s[key] for key in ("rows", "bytes", "checksum", "input_digest")}
            for i, s in enumerate(summaries)
        ],
        "totals": _totals(summaries),
        "per_language": _per_language(runs, languages),
        "length_histogram": _histogram(runs),
        "fingerprint": _fingerprint(summaries),
    }
    write_checked(folder / "manifest.json", [json.dumps(manifest, sort_keys=True, indent=1).encode()])
    for leftover in folder.rglob("*.tmp"):
        leftover.unlink(missing_ok=True)
    return manifest


def duplicate_lines(folder: Path, summaries: list[dict]) -> dict[int, list[int]]:
    """Per unit, the lines whose record id an earlier line already has. Ids are compared range by range: memory stays bounded."""
    with_ids = sum(summary["with_ids"] for summary in summaries)
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
    folder: Path, summaries: list[dict], part: int, num_parts: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    for unit, summary in enumerate(summaries):
        if summary["with_ids"]:
            columns = Shard(folder / "shards" / f"{unit:05d}.arrow", summary["bytes"]).columns
            chosen = np.flatnonzero(
                (columns["id_hash"] != 0)
                & (columns["id_hash"].view(np.uint64) % np.uint64(num_parts) == part)
            )
            yield columns["id_hash"][chosen], np.full(len(chosen), unit), columns["line"][chosen]


def _check_kind(folder: Path, name: str, summaries: list[dict]) -> str:
    firsts: dict[str, str] = {}
    for summary in summaries:
        for kind in ("pair", "text"):
            if kind in summary["first"]:
                firsts.setdefault(kind, summary["first"][kind])
    if not firsts:
        rejected = sum(summary["rejected"] for summary in summaries)
        remedy = (
            f"see {folder}/shards/*.rejects.jsonl for the reasons"
            if rejected
            else "its files are empty; correct the paths"
        )
        raise DataError(f"dataset {name}", f"{rejected} records rejected", "holds no usable record", remedy)
    if len(firsts) == 2:
        rule = f"mixes pairs (first at {firsts['pair']}) and texts (first at {firsts['text']})"
        raise DataError(f"dataset {name}", "pairs and texts", rule, "make two datasets of it")
    return next(iter(firsts))


def _check_scores(name: str, summaries: list[dict]) -> None:
    with_scores = sum(summary["with_scores"] for summary in summaries)
    without = [s["first"]["pair_without_scores"] for s in summaries if "pair_without_scores" in s["first"]]
    if with_scores and without:
        rule = f"has teacher scores in {with_scores} records but not in all (first without: {without[0]})"
        raise DataError(
            f"dataset {name} pos_scores",
            None,
            rule,
            "score every record of the dataset, or make two datasets of it",
        )


def _write_index(folder: Path, summaries: list[dict]) -> None:
    """index.npy shard by shard: 8 bytes a row are too many to hold for a billion rows."""
    header = {
        "descr": np.lib.format.dtype_to_descr(INDEX_DTYPE),
        "fortran_order": False,
        "shape": (sum(s["rows"] for s in summaries),),
    }

    def blocks() -> Iterator[bytes]:
        yield _npy_header(header)
        for unit, summary in enumerate(summaries):
            columns = Shard(folder / "shards" / f"{unit:05d}.arrow", summary["bytes"]).columns
            block = np.empty(summary["rows"], INDEX_DTYPE)
            for field in INDEX_FIELDS:
                block[field] = columns[field]
            yield block.tobytes()

    write_checked(folder / "index.npy", blocks())


def _npy_header(header: dict) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array_header_1_0(sink, header)
    return sink.getvalue()


def _runs(summaries: list[dict], languages: list[str]) -> np.ndarray:
    code = {language: number for number, language in enumerate(languages)}
    entries = [
        (code[lang], longest, rows, tokens)
        for summary in summaries
        for lang, longest, rows, tokens in summary["runs"]
    ]
    runs = np.empty(len(entries), RUN_DTYPE)
    for column, field in enumerate(("language", "longest", "num_rows", "tokens")):
        runs[field] = [entry[column] for entry in entries]
    runs["first_row"] = np.cumsum(runs["num_rows"]) - runs["num_rows"]
    return runs


def _merge_rejects(folder: Path, num_units: int) -> None:
    parts = [folder / "shards" / f"{unit:05d}.rejects.jsonl" for unit in range(num_units)]
    if any(part.is_file() for part in parts):
        write_checked(folder / "rejected.jsonl", (part.read_bytes() for part in parts if part.is_file()))


def _totals(summaries: list[dict]) -> dict:
    names = ("rows", "texts", "tokens", "truncated", "rejected", "with_ids", "with_scores", "bytes")
    reasons: Counter[str] = sum((Counter(summary["reasons"]) for summary in summaries), Counter())
    return {name: sum(summary[name] for summary in summaries) for name in names} | {
        "reasons": dict(sorted(reasons.items()))
    }


def _per_language(runs: np.ndarray, languages: list[str]) -> dict:
    rows = np.bincount(runs["language"], weights=runs["num_rows"], minlength=len(languages))
    tokens = np.bincount(runs["language"], weights=runs["tokens"], minlength=len(languages))
    return {
        language: {"rows": int(rows[i]), "tokens": int(tokens[i])} for i, language in enumerate(languages)
    }


def _histogram(runs: np.ndarray) -> list[list[int]]:
    """[upper edge in tokens, rows whose longest text is at most that and above the edge before], edges doubling from 16."""
    edges = [16 << i for i in range(13)]
    counts = np.bincount(
        np.searchsorted(edges, runs["longest"]), weights=runs["num_rows"], minlength=len(edges)
    )
    return [[edge, int(count)] for edge, count in zip(edges, counts)]


def _fingerprint(summaries: list[dict]) -> str:
    hasher = hashlib.blake2b(digest_size=16)
    for summary in summaries:
        hasher.update(f"{summary['rows']} {summary['checksum']}\n".encode())
    return hasher.hexdigest()
