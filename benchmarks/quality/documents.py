"""Texts, and long documents with questions, from files of pairs.

    python -m benchmarks.quality.documents texts OUT.jsonl FILE.jsonl [FILE.jsonl …] [--min-characters 2000]
    python -m benchmarks.quality.documents articles OUT FILE.jsonl [FILE.jsonl …] [--passages 7]

`texts` writes {"text"} for every distinct passage ("pos") or "text" of the files, for pretraining.

`articles` joins so many neighbouring passages of a file to one document. Files of questions on an
encyclopedia keep the passages of one article together, so the document is much like the article, and each
question asks for one place of it, often far from its beginning:

    OUT/train.jsonl    {"query", "pos": [document]} of three documents in four
    OUT/test/          BEIR folder of the others; "lang" of a query is the place of its passage (`passage-3`),
                       so that tables by language show how far from the beginning the answer stands
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.quality.splits import write_lines

TEST_OF = 4


def records_of(path: Path) -> Iterator[dict]:
    """The file's lines."""
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def distinct_texts(paths: Sequence[Path], min_characters: int) -> list[str]:
    """Passages and texts of at least that many characters, each once, in the files' order."""
    found: dict[str, None] = {}
    for path in paths:
        for record in records_of(path):
            for text in record.get("pos") or [record["text"]]:
                if len(text) >= min_characters:
                    found[text] = None
    return list(found)


def articles(path: Path, passages: int) -> list[tuple[str, list[tuple[str, int]]]]:
    """(document, [(question, place of its passage)]) for each run of `passages` neighbours."""
    questions: dict[str, list[str]] = {}
    for record in records_of(path):
        questions.setdefault(record["pos"][0], []).append(record["query"])
    texts = list(questions)
    whole = range(0, len(texts) - passages + 1, passages)
    return [
        (
            "\n".join(texts[first : first + passages]),
            [(q, place) for place in range(passages) for q in questions[texts[first + place]]],
        )
        for first in whole
    ]


def write_articles(out: Path, paths: Sequence[Path], passages: int, test_queries: int) -> None:
    """OUT/train.jsonl and OUT/test of all files together."""
    train, corpus, asked = [], [], []
    for path in paths:
        for number, (document, questions) in enumerate(articles(path, passages)):
            if number % TEST_OF:
                train += [
                    {"query": q, "pos": [document], "neg": [], "place": place} for q, place in questions
                ]
                continue
            identity = f"{path.stem}-{number}"
            corpus.append({"_id": identity, "title": "", "text": document})
            asked += [(q, place, identity) for q, place in questions]
    asked = random.Random(0).sample(asked, min(test_queries, len(asked)))
    write_lines(out / "train.jsonl", train)
    write_lines(out / "test" / "corpus.jsonl", corpus)
    queries = (
        {"_id": f"q{n}", "text": q, "lang": f"passage-{place + 1}"} for n, (q, place, _) in enumerate(asked)
    )
    write_lines(out / "test" / "queries.jsonl", queries)
    (out / "test" / "qrels").mkdir(exist_ok=True)
    judged = "\n".join(f"q{n}\t{identity}\t1" for n, (_, _, identity) in enumerate(asked))
    (out / "test" / "qrels" / "test.tsv").write_text(
        f"query-id\tcorpus-id\tscore\n{judged}\n", encoding="utf-8"
    )
    print(f"{out}: {len(train)} training questions; test: {len(asked)} questions, {len(corpus)} documents")


def main(argv: Sequence[str] | None = None) -> int:
    """One of the two."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["texts", "articles"])
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--min-characters", type=int, default=200)
    parser.add_argument("--passages", type=int, default=7)
    parser.add_argument("--test-queries", type=int, default=600)
    given = parser.parse_args(argv)
    if given.what == "texts":
        texts = distinct_texts(given.files, given.min_characters)
        write_lines(given.out, ({"text": text} for text in texts))
        print(f"{given.out}: {len(texts)} texts")
    else:
        write_articles(given.out, given.files, given.passages, given.test_queries)
    return 0


if __name__ == "__main__":
    sys.exit(main())
