"""Training pairs and a held-out BEIR folder, from help pages or from the user's own pairs.

    OUT/train.jsonl             {"query", "pos": [body], "neg": [], "lang"}
    OUT/heldout/corpus.jsonl    {"_id", "title": "", "text"}        held-out passages and distractors
    OUT/heldout/queries.jsonl   {"_id", "text", "lang"}
    OUT/heldout/qrels/test.tsv  query-id  corpus-id  score

Help pages are split by page over ALL languages, so that no translation of a held-out page is trained on. One
page in ten is held out; two more in ten, which are trained on, also stand in the held-out corpus as
distractors.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from examples.quickstart.pages import Page
from megam3.errors import DataError

HELD_OUT_TENTH = 0
DISTRACTOR_TENTHS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Query:
    """A held-out query and the ids of the passages that answer it."""

    id: str
    text: str
    language: str
    passage_ids: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    """What `write_corpus` writes."""

    train: list[dict]
    passages: dict[str, str]
    queries: list[Query]


def tenth(key: str) -> int:
    """The tenth (0–9) a page or passage belongs to: a hash, so that it never depends on order or on what else
    is there."""
    return zlib.crc32(key.encode("utf-8")) % 10


def corpus_from_pages(pages: Iterable[Page]) -> Corpus:
    """Train on description → body and title → body; held-out queries are descriptions (titles where there is
    none)."""
    train: list[dict] = []
    passages: dict[str, str] = {}
    queries: list[Query] = []
    for page in pages:
        page_id, part = f"{page.language}/{page.name}", tenth(page.name)
        texts = [text for text in (page.description, page.title) if text]
        if part == HELD_OUT_TENTH:
            passages[page_id] = page.body
            queries.extend(
                Query(id=page_id, text=text, language=page.language, passage_ids=(page_id,))
                for text in texts[:1]
            )
            continue
        if part in DISTRACTOR_TENTHS:
            passages[page_id] = page.body
        train.extend({"query": text, "pos": [page.body], "neg": [], "lang": page.language} for text in texts)
    return Corpus(train, passages, queries)


_PAIR_REMEDY = 'write one {"query": "…", "pos": ["…"]} a line'


def _read_pair(where: str, line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(where, line[:80], f"is not JSON ({error.msg})", _PAIR_REMEDY) from None
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("query"), str)
        or not record["query"].strip()
    ):
        raise DataError(where, line[:80], "needs a non-empty text under `query`", _PAIR_REMEDY)
    positives = record.get("pos")
    if (
        not isinstance(positives, list)
        or not positives
        or not all(isinstance(text, str) and text.strip() for text in positives)
    ):
        raise DataError(
            where,
            positives,
            "`pos` must be a list of at least one non-empty text",
            'write one {"query": …, "pos": […]} a line',
        )
    return record


def corpus_from_pairs(path: str | Path) -> Corpus:
    """Split the user's own pairs by a hash of the positive text: held out when any positive falls in the
    held-out tenth.

    The held-out corpus is those records' positives, plus as distractors the positives and negatives of two
    tenths of the others.

    Raises:
        DataError: a missing or empty file, a bad line (`file:line`), or so few texts that one side of the
            split is empty.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            "DATA",
            str(path),
            "is not a file",
            "give a JSONL file of pairs, or leave DATA out to use the help pages",
        )
    train: list[dict] = []
    passages: dict[str, str] = {}
    queries: list[Query] = []

    def passage_id(text: str) -> str:
        return ids.setdefault(text, f"p{len(ids)}")

    ids: dict[str, str] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            record = _read_pair(f"{path}:{number}", line)
            parts = {tenth(text) for text in record["pos"]}
            if HELD_OUT_TENTH in parts:
                found = {passage_id(text): text for text in record["pos"]}
                queries.append(
                    Query(
                        id=f"q{number}",
                        text=record["query"],
                        language=str(record.get("lang", "und")),
                        passage_ids=tuple(found),
                    )
                )
                passages.update(found)
                continue
            train.append(record)
            if parts.intersection(DISTRACTOR_TENTHS):
                passages.update({passage_id(text): text for text in [*record["pos"], *record.get("neg", [])]})
    if not train or not queries:
        raise DataError(
            "DATA",
            str(path),
            f"gives {len(train)} training and {len(queries)} held-out pairs",
            "give a few hundred pairs",
        )
    return Corpus(train, passages, queries)


def _write_lines(path: Path, rows: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8")


def write_corpus(corpus: Corpus, folder: str | Path) -> None:
    """Write the four files of the module's docstring under `folder`."""
    folder = Path(folder)

    def line(**fields: object) -> str:
        return json.dumps(fields, ensure_ascii=False)

    _write_lines(folder / "train.jsonl", (line(**record) for record in corpus.train))
    heldout = folder / "heldout"
    _write_lines(
        heldout / "corpus.jsonl",
        (line(_id=key, title="", text=text) for key, text in corpus.passages.items()),
    )
    _write_lines(
        heldout / "queries.jsonl",
        (line(_id=query.id, text=query.text, lang=query.language) for query in corpus.queries),
    )
    judgements = (f"{query.id}\t{passage}\t1" for query in corpus.queries for passage in query.passage_ids)
    _write_lines(heldout / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *judgements])


def training_texts(corpus: Corpus) -> list[str]:
    """The distinct texts of the training side, in order: what a tokenizer may learn from."""
    texts = [
        text for record in corpus.train for text in (record["query"], *record["pos"], *record.get("neg", []))
    ]
    return list(dict.fromkeys(texts))


def training_passages(corpus: Corpus) -> list[str]:
    """The distinct positives of the training side, in order: what document frequencies are counted over."""
    return list(dict.fromkeys(text for record in corpus.train for text in record["pos"]))
