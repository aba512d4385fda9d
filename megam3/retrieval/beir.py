"""Read a test set in BEIR format: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv in one folder.

    corpus.jsonl      {"_id": "d1", "title": "Fonts", "text": "Choose larger fonts …"}
    queries.jsonl     {"_id": "q1", "text": "bigger letters", "lang": "en"}   or under "metadata"
    qrels/test.tsv    query-id <tab> corpus-id <tab> score, with this header line or without

Only queries with a judgement above 0 are kept: the file often holds the queries of all splits. Queries with
`"answers": ["…"]` need no judgements: a passage is relevant if it holds one (`answers.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megam3.errors import DataError
from megam3.files import folder_name, parse_json

MAX_LINE_CHARACTERS = 1 << 25
"""The longest document of a published benchmark has some hundred thousand."""
_LAYOUT = "a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv"


@dataclass(frozen=True, kw_only=True)
class BeirDataset:
    """One test set; queries and judgements in memory, passages there or on disk."""

    name: str
    passage_ids: Sequence[str]
    passages: Sequence[str]
    """Title and text, joined by a space when there is a title."""
    query_ids: list[str]
    queries: list[str]
    languages: list[str]
    """Of each query; `und` when it says none."""
    qrels: dict[str, dict[str, int]]
    """query id -> passage id -> grade; empty where `answers` judge."""
    answers: dict[str, list[str]] | None = None
    """query id -> texts of which a relevant passage holds one; None: `qrels` judge."""


def _read_lines(path: Path) -> Iterator[tuple[str, str]]:
    if not path.is_file():
        raise DataError("evaluation folder", str(path), "is not there", _LAYOUT)
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_CHARACTERS + 1), ""), 1):
            if len(line) > MAX_LINE_CHARACTERS:
                rule = f"has more than {MAX_LINE_CHARACTERS} characters"
                raise DataError(f"{path}:{number}", line[:80], rule, "cut the text up")
            if line.strip():
                yield f"{path}:{number}", line.rstrip("\n")


def _read_records(path: Path, unique: bool = True) -> Iterator[dict]:
    """Records with a string `_id` (numbers are accepted), which no other has if `unique`, and a string
    `text`."""
    seen: set[str] = set()
    for where, line in _read_lines(path):
        try:
            record = parse_json(line)
        except ValueError as error:
            rule = f"is not JSON ({getattr(error, 'msg', error)})"
            raise DataError(where, line[:80], rule, "write one JSON object a line") from None
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
            raise repeated_id(where, record["_id"])
        if unique:
            seen.add(record["_id"])
        yield record


def read_corpus(folder: Path, unique: bool = True) -> Iterator[tuple[str, str]]:
    """(id, title and text) of each passage, one at a time.

    Args:
        unique: refuse an id that was there before, which needs all of them in memory.

    Raises:
        DataError: a missing file, or a bad line (`file:line`).
    """
    for record in _read_records(folder / "corpus.jsonl", unique):
        yield record["_id"], f"{record.get('title') or ''} {record['text']}".strip()


def repeated_id(where: str, found: str) -> DataError:
    """The error of an `_id` that two records have."""
    return DataError(where, found, "this `_id` was there before", "give every line an `_id` of its own")


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


def _answers(queries: dict[str, dict]) -> dict[str, list[str]]:
    """Answers of the queries that have some."""
    found = {query: record.get("answers") for query, record in queries.items()}
    return {
        query: [str(a) for a in given] for query, given in found.items() if isinstance(given, list) and given
    }


def read_beir(folder: str | Path, split: str = "test") -> BeirDataset:
    """Read the test set in `folder`, passages included.

    Raises:
        DataError: a missing file, a bad line (`file:line`), a judgement of an unknown query or passage, or no
            judgement above 0.
    """
    folder = Path(folder)
    passages = dict(read_corpus(folder))
    return read_judged(folder, split, list(passages), list(passages.values()))


def read_judged(folder: Path, split: str, passage_ids: Sequence[str], passages: Sequence[str]) -> BeirDataset:
    """Queries and judgements of `folder` over passages that were read already.

    Raises:
        DataError: as `read_beir`; nothing is said of a passage without a judgement.
    """
    queries = {record["_id"]: record for record in _read_records(folder / "queries.jsonl")}
    qrels_file = folder / "qrels" / f"{split}.tsv"
    lines = list(_read_qrels(qrels_file))
    judged = {passage for _, _, passage, _ in lines}
    known = {passage for passage in passage_ids if passage in judged}
    qrels: dict[str, dict[str, int]] = {}
    for where, query, passage, grade in lines:
        for name, kind, file, held in (
            (query, "query", "queries.jsonl", queries),
            (passage, "passage", "corpus.jsonl", known),
        ):
            if name not in held:
                rule = f"names a {kind} that {file} does not hold"
                raise DataError(where, name, rule, "use the files of one data set")
        qrels.setdefault(query, {})[passage] = grade
    qrels = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
    answers = {} if qrels else _answers(queries)
    if not qrels and not answers:
        raise DataError(
            "evaluation folder",
            str(qrels_file),
            "holds no judgement above 0",
            "nothing can be measured without one",
        )
    kept = [query for query in queries if query in (answers or qrels)]
    return BeirDataset(
        name=folder_name(folder),
        passage_ids=passage_ids,
        passages=passages,
        query_ids=kept,
        queries=[queries[query]["text"] for query in kept],
        languages=[_language(queries[query]) for query in kept],
        qrels=qrels,
        answers=answers or None,
    )
