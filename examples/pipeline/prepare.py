"""What `chain.yaml` reads: help pages, or the user's own pairs, and an untrained encoder, below one folder.

    python -m examples.pipeline.prepare [runs/chain/start] [--data pairs.jsonl]

    encoder/         untrained, of 3 layers × 256, made for texts of 256 tokens
    train.jsonl      all pairs, for contrastive pretraining
    texts.jsonl      their passages, {"text"}: for RetroMAE, and to mine from
    few.jsonl        at most 3 000 of the pairs, for mining, teacher scores and the unified stage
    heldout/         BEIR folder of pages that no pair is about

Corpus, tokenizer and encoder are those of the quickstart, whose help pages Debian's package holds.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.quickstart.encoder import EncoderSize
from examples.quickstart.prepare import prepare
from megam3.files import atomic_file
from megam3.obs.log import setup_logging

START_TOKENS = 256
"""Positions before `extend-positions`, so that there is something to extend."""
NUM_FEW = 3000
"""A few thousand steps' worth of the unified stage; mining and scoring more would only take time here."""


def prepare_chain(folder: Path, pairs: Path | None = None, cache: Path | None = None) -> None:
    """Make what is missing below `folder`.

    Raises:
        DataError: the corpus cannot be fetched or read.
    """
    prepared = prepare(folder, pairs, cache, size=EncoderSize(max_tokens=START_TOKENS))
    records = [json.loads(line) for line in prepared.train_file.read_text(encoding="utf-8").splitlines()]
    passages = dict.fromkeys(passage for record in records for passage in record["pos"])
    few = records if len(records) <= NUM_FEW else random.Random(0).sample(records, NUM_FEW)
    _write(folder / "texts.jsonl", [{"text": passage} for passage in passages])
    _write(folder / "few.jsonl", few)


def _write(path: Path, records: Sequence[dict]) -> None:
    with atomic_file(path, "w") as out:
        out.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", default="runs/chain/start", type=Path)
    parser.add_argument("--data", default=None, type=Path, help='your own pairs: {"query": …, "pos": […]}')
    given = parser.parse_args(argv)
    setup_logging(None, is_main=True)
    prepare_chain(given.folder, given.data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
