"""Read a test set in BEIR format: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv in one folder.

    corpus.jsonl      {"_id": "d1", "title": "Fonts", "text": "Choose larger fonts …"}
    queries.jsonl     {"_id": "q1", "text": "bigger letters", "lang": "en"}   or under "metadata"
    qrels/test.tsv    query-id <tab> corpus-id <tab> score, with this header line or without

Only queries with a judgement above 0 are kept: the file often holds the queries of all splits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megam3.errors import DataError

_LAYOUT = "a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv"


@dataclass(frozen=True, kw_only=True)
class BeirDataset:
    """One test set in memory."""

    name: str
    passage_ids: list[str]
    passages: list[str]
    """Title and text, joined by a space when there is a title."""
    query_ids: list[str]
    queries: list[str]
    languages: list[str]
    """Of each query; `und` when it says none."""
    qrels: dict[str, dict[str, int]]
    """query id -> passage id -> grade."""


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise DataError("evaluation folder", str(path), "is not there", _LAYOUT)
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", line.rstrip("\n")


def _read_records(path: Path) -> Iterator[dict]:
    """Records with a string `_id` (numbers are accepted) and a string `text`."""
    seen: set[str] = set()
    for where, line in _read_lines(path):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                where, line[:80], f"is not JSON ({error.msg})", "write one JSON object a line"
            ) from None
        if (
            not isinstance(record, dict)
            or not isinstance(record.get("_id"), str | int)
            or not isinstance(record.get("text"), str)
        ):
            raise DataError(
                where,
                line[:80],
                "needs `_id` and a text under `text`",
                "see BEIR's format: https://github.com/beir-cellar/beir",
            )
        record["_id"] = str(record["_id"])
        if record["_id"] in seen:
            raise DataError(
                where, record["_id"], "this `_id` was there before", "give every line an `_id` of its own"
            )
        seen.add(record["_id"])
        yield record


def _read_qrels(path: Path) -> Iterator[tuple[str, str, str, int]]:
    for number, (where, line) in enumerate(_read_lines(path)):
        fields = line.split("\t")
        if number == 0 and fields[-1].strip() == "score":
            continue
        if len(fields) != 3 or not fields[2].strip().lstrip("-").isdigit():
            raise DataError(
                where,
                line[:80],
                "needs three fields: query-id, corpus-id and a whole number",
                "separate them by tabs",
            )
        yield where, fields[0].strip(), fields[1].strip(), int(fields[2])


def _language(record: dict) -> str:
    metadata = record.get("metadata")
    inner = metadata.get("lang") if isinstance(metadata, dict) else None
    return str(record.get("lang") or inner or "und")


def read_beir(folder: str | Path, split: str = "test") -> BeirDataset:
    """Read the test set in `folder`.

    Raises:
        DataError: a missing file, a bad line (`file:line`), a judgement of an unknown query or passage, or no
            judgement above 0.
    """
    folder = Path(folder)
    passages: dict[str, str] = {}
    for record in _read_records(folder / "corpus.jsonl"):
        title = record.get("title") or ""
        passages[record["_id"]] = f"{title} {record['text']}".strip()
    queries = {record["_id"]: record for record in _read_records(folder / "queries.jsonl")}
    qrels_file = folder / "qrels" / f"{split}.tsv"
    qrels: dict[str, dict[str, int]] = {}
    for where, query, passage, grade in _read_qrels(qrels_file):
        if query not in queries:
            raise DataError(
                where,
                query,
                "names a query that queries.jsonl does not hold",
                "use the files of one data set",
            )
        if passage not in passages:
            raise DataError(
                where,
                passage,
                "names a passage that corpus.jsonl does not hold",
                "use the files of one data set",
            )
        qrels.setdefault(query, {})[passage] = grade
    qrels = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
    if not qrels:
        raise DataError(
            "evaluation folder",
            str(qrels_file),
            "holds no judgement above 0",
            "nothing can be measured without one",
        )
    kept = [query for query in queries if query in qrels]
    return BeirDataset(
        name=folder.name,
        passage_ids=list(passages),
        passages=list(passages.values()),
        query_ids=kept,
        queries=[queries[query]["text"] for query in kept],
        languages=[_language(queries[query]) for query in kept],
        qrels=qrels,
    )
