"""Random negatives for training records, as many as mined ones, from the passages of the same file.

    python -m benchmarks.quality.random_negatives PAIRS.jsonl OUT.jsonl --negatives 7

What mined negatives are compared with: the same number of passages a query, drawn at random. A passage that
answers the same question elsewhere in the file is never drawn.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.quality.documents import records_of
from benchmarks.quality.splits import write_lines


def with_random_negatives(records: Sequence[dict], negatives: int, seed: int) -> list[dict]:
    """The records, each with that many passages of the others in "neg"."""
    draw = random.Random(seed)
    passages = sorted({passage for record in records for passage in record["pos"]})
    known: dict[str, set[str]] = {}
    for record in records:
        known.setdefault(record["query"], set()).update(record["pos"])
    out = []
    for record in records:
        theirs = known[record["query"]]
        drawn = draw.sample(passages, negatives + len(theirs))
        out.append({**record, "neg": [text for text in drawn if text not in theirs][:negatives]})
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Write OUT."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--negatives", type=int, default=7, help="a query (default: %(default)s)")
    given = parser.parse_args(argv)
    write_lines(given.out, with_random_negatives(list(records_of(given.pairs)), given.negatives, seed=0))
    return 0


if __name__ == "__main__":
    sys.exit(main())
