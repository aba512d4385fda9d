"""False negatives planted in a corpus, and the share that each score filter of `megam3 mine` takes out.

    python -m benchmarks.quality.planted make OUT FILE.jsonl [FILE.jsonl …] [--queries 800]
    megam3 mine OUT/pairs.jsonl --corpus OUT/corpus.jsonl --model MODEL --output OUT/mined.jsonl \\
        --range 0-50 --negatives 50 --sample first
    python -m benchmarks.quality.planted report OUT
    megam3 mine … --output OUT/ratio.jsonl --ratio 0.95 …
    python -m benchmarks.quality.planted confirm OUT OUT/ratio.jsonl

Planted are two texts for each query's positive, which still answer the query but are no copies that a hash
would find: one with every fifth word left out (every fifth character where there are no spaces), one with
its second half before its first. `make` takes one query of a passage.

`report` reads the scores of the candidates from one run without filters and applies the filters' own rule to
them (`megam3.retrieval.mining.select.score_ceiling`); `confirm` counts what a run with a filter took out of
the same candidates.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.quality.documents import records_of
from benchmarks.quality.splits import write_lines
from megam3.retrieval.mining.select import SelectOptions, score_ceiling

FILTERS = (
    SelectOptions(margin=0.02),
    SelectOptions(margin=0.05),
    SelectOptions(margin=0.1),
    SelectOptions(ratio=0.98),
    SelectOptions(ratio=0.95),
    SelectOptions(ratio=0.9),
    SelectOptions(max_score=0.9),
    SelectOptions(max_score=0.85),
    SelectOptions(max_score=0.8),
)


def without_every_fifth(text: str) -> str:
    """Every fifth word left out, or character where there are no spaces."""
    joint = " " if text.count(" ") > len(text) / 20 else ""
    parts = text.split(" ") if joint else list(text)
    return joint.join(part for n, part in enumerate(parts) if n % 5 != 4)


def halves_exchanged(text: str) -> str:
    """The second half before the first, cut at a space where there are spaces."""
    middle = len(text) // 2
    middle = text.find(" ", middle) if " " in text[middle:] else middle
    return f"{text[middle:].strip()} {text[:middle].strip()}"


def make(out: Path, files: Sequence[Path], num_queries: int) -> None:
    """OUT/pairs.jsonl, OUT/corpus.jsonl and OUT/planted.jsonl: {"of": positive, "text": planted}."""
    query_of: dict[str, str] = {}
    for path in files:
        for record in records_of(path):
            query_of.setdefault(record["pos"][0], record["query"])
    passages = list(query_of)
    asked = random.Random(0).sample(passages, min(num_queries, len(passages)))
    planted = [
        {"of": p, "text": change(p)} for p in asked for change in (without_every_fifth, halves_exchanged)
    ]
    write_lines(out / "pairs.jsonl", ({"query": query_of[p], "pos": [p], "neg": []} for p in asked))
    write_lines(out / "planted.jsonl", planted)
    write_lines(out / "corpus.jsonl", ({"text": t} for t in [*passages, *(each["text"] for each in planted)]))
    print(f"{len(asked)} queries, {len(passages) + len(planted)} passages, {len(planted)} of them planted")


def report(out: Path) -> None:
    """A table: what each filter takes of the planted among the candidates, and of the others."""
    planted: dict[str, set[str]] = {}
    for each in records_of(out / "planted.jsonl"):
        planted.setdefault(each["of"], set()).add(each["text"])
    rows = []
    for record in records_of(out / "mined.jsonl"):
        theirs = planted[record["pos"][0]]
        is_planted = np.array([text in theirs for text in record["neg"]], dtype=bool)
        rows.append((np.array(record["pos_scores"]), np.array(record["neg_scores"]), is_planted))
    found = sum(int(flags.sum()) for _, _, flags in rows)
    others = sum(int((~flags).sum()) for _, _, flags in rows)
    total = sum(len(texts) for texts in planted.values())
    print(f"{found} of {total} planted are among the candidates, with {others} others\n")
    print("| filter | planted taken out | of the others taken out | queries left with 7 or more |")
    print("|---|---|---|---|")
    for options in FILTERS:
        caught = lost = enough = 0
        for positives, scores, flags in rows:
            taken = scores > min(score_ceiling(positives, options).values())
            caught, lost = caught + int((taken & flags).sum()), lost + int((taken & ~flags).sum())
            enough += int((~taken).sum()) >= 7
        name = next(
            f"{k} {v}" for k, v in (vars(options)).items() if k in ("margin", "ratio", "max_score") and v
        )
        print(f"| {name} | {caught / found:.1%} | {lost / others:.1%} | {enough / len(rows):.1%} |")


def confirm(out: Path, mined: Path) -> tuple[float, float]:
    """Shares of the planted and of the other candidates that are gone in `mined`, printed and returned."""
    planted: dict[str, set[str]] = {}
    for each in records_of(out / "planted.jsonl"):
        planted.setdefault(each["of"], set()).add(each["text"])
    before, gone = [0, 0], [0, 0]
    for whole, filtered in zip(records_of(out / "mined.jsonl"), records_of(mined), strict=True):
        theirs, kept = planted[whole["pos"][0]], set(filtered["neg"])
        for text in whole["neg"]:
            kind = 0 if text in theirs else 1
            before[kind] += 1
            gone[kind] += text not in kept
    shares = gone[0] / max(before[0], 1), gone[1] / max(before[1], 1)
    print(f"{mined.name}: planted taken out {shares[0]:.1%}, of the others {shares[1]:.1%}")
    return shares


def main(argv: Sequence[str] | None = None) -> int:
    """One of the three."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["make", "report", "confirm"])
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--queries", type=int, default=800)
    given = parser.parse_args(argv)
    if given.what == "make":
        make(given.out, given.files, given.queries)
    elif given.what == "report":
        report(given.out)
    else:
        for path in given.files:
            confirm(given.out, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
