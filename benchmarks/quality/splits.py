"""Training files and test sets from folders of question files, split by passage.

    python -m benchmarks.quality.splits PAIRS_FOLDER OUT --train ja,tr,zh-Hant --heldout ar,fa,th
        [--test-heldout th,zh-Hans]

PAIRS_FOLDER holds NAME.LANG.jsonl with {"query", "pos": [one passage]}; languages are taken from file names.

    OUT/train/LANG.jsonl     pairs of the training languages
    OUT/corpus.jsonl         the passages of OUT/train, for mining

Settings are chosen on

    OUT/dev/                 BEIR folder: unseen questions and unseen passages of the training languages
    OUT/heldout/             BEIR folder: languages that no pair is in

and what was chosen is reported, once, on

    OUT/test/                like dev, other passages
    OUT/test-heldout/        like heldout, of --test-heldout; a language of both has other passages here

Several questions share a passage, so a passage is in training, dev or test with all of its questions: of
eight passages one is dev and one is test, by a hash of their text.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

PARTS = 8
DEV, TEST = 0, 1


def read_pairs(folder: Path, language: str) -> list[tuple[str, str]]:
    """(query, passage) of every file of that language, in the files' order."""
    pairs = []
    for path in sorted(folder.glob(f"*.{language}.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            pairs.append((record["query"], record["pos"][0]))
    if not pairs:
        raise SystemExit(f"{folder} has no file *.{language}.jsonl")
    return pairs


def part_of(passage: str) -> int:
    """DEV, TEST, or above: training. The same answer in every run and on every machine."""
    return zlib.crc32(passage.encode()) % PARTS


def sample_by_passage(
    pairs: Iterable[tuple[str, str]], max_passages: int, max_queries: int, seed: int
) -> list[tuple[str, str]]:
    """At most so many passages, and at most so many of their questions, drawn at random."""
    pairs = list(pairs)
    draw = random.Random(seed)
    passages = sorted({passage for _, passage in pairs})
    chosen = set(draw.sample(passages, min(max_passages, len(passages))))
    kept = [pair for pair in pairs if pair[1] in chosen]
    return kept if len(kept) <= max_queries else draw.sample(kept, max_queries)


def write_lines(path: Path, records: Iterable[dict]) -> None:
    """JSONL, its folder made when missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as out:
        for record in records:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_beir(folder: Path, by_language: dict[str, list[tuple[str, str]]]) -> tuple[int, int]:
    """One corpus of all languages, so that a passage of another language can be a wrong answer too."""
    corpus: dict[str, dict] = {}
    queries: list[dict] = []
    judged: list[str] = []
    for language, pairs in by_language.items():
        for query, passage in pairs:
            entry = corpus.setdefault(
                passage, {"_id": f"p{len(corpus)}", "title": "", "text": passage, "lang": language}
            )
            number = f"q{len(queries)}"
            queries.append({"_id": number, "text": query, "lang": language})
            judged.append(f"{number}\t{entry['_id']}\t1")
    write_lines(folder / "corpus.jsonl", corpus.values())
    write_lines(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / "test.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "\n".join(judged) + "\n", encoding="utf-8"
    )
    return len(queries), len(corpus)


def main(argv: Sequence[str] | None = None) -> int:
    """Write everything below OUT and print how much there is of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train", required=True, help="languages, separated by commas")
    parser.add_argument("--heldout", required=True, help="languages, separated by commas")
    parser.add_argument("--test-heldout", default="", help="languages, separated by commas")
    parser.add_argument("--max-train", type=int, default=6000, help="pairs a language (default: %(default)s)")
    parser.add_argument("--test-passages", type=int, default=400, help="a language (default: %(default)s)")
    parser.add_argument("--test-queries", type=int, default=500, help="a language (default: %(default)s)")
    given = parser.parse_args(argv)
    limits = (given.test_passages, given.test_queries, 0)
    sets: dict[str, dict[str, list[tuple[str, str]]]] = {"dev": {}, "test": {}, "heldout": {}}
    corpus = []
    for language in given.train.split(","):
        pairs = read_pairs(given.pairs, language)
        train = [pair for pair in pairs if part_of(pair[1]) > TEST]
        train = random.Random(0).sample(train, min(given.max_train, len(train)))
        for name, part in (("dev", DEV), ("test", TEST)):
            theirs = [pair for pair in pairs if part_of(pair[1]) == part]
            sets[name][language] = sample_by_passage(theirs, *limits)
        records = ({"query": query, "pos": [passage], "neg": []} for query, passage in train)
        write_lines(given.out / "train" / f"{language}.jsonl", records)
        corpus += sorted({passage for _, passage in train})
        print(f"train {language}: {len(train)} pairs")
    write_lines(given.out / "corpus.jsonl", ({"text": passage} for passage in corpus))
    for language in given.heldout.split(","):
        sets["heldout"][language] = sample_by_passage(read_pairs(given.pairs, language), *limits)
    for language in filter(None, given.test_heldout.split(",")):
        chosen_on = {passage for _, passage in sets["heldout"].get(language, [])}
        rest = [pair for pair in read_pairs(given.pairs, language) if pair[1] not in chosen_on]
        sets.setdefault("test-heldout", {})[language] = sample_by_passage(rest, *limits)
    for name, by_language in sets.items():
        queries, passages = write_beir(given.out / name, by_language)
        print(f"{name} {','.join(by_language)}: {queries} queries, {passages} passages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
