"""Prepare the quickstart: corpus, tokenizer and encoder under one folder.

    OUT/train.jsonl
    OUT/heldout/{corpus.jsonl,queries.jsonl,qrels/test.tsv}
    OUT/encoder/{config.json,model.safetensors,sparse_linear.pt,colbert_linear.pt,tokenizer.json,…}

A finished part is found again and not made twice.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from examples.quickstart.corpus import (
    Corpus,
    corpus_from_pages,
    corpus_from_pairs,
    training_passages,
    training_texts,
    write_corpus,
)
from examples.quickstart.encoder import EncoderInit, EncoderSize, build_encoder
from examples.quickstart.fetch import fetch_help_pages
from examples.quickstart.pages import read_help_pages
from examples.quickstart.tokenizer import train_tokenizer
from megam3.obs.log import setup_logging

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Where the parts lie."""

    train_file: Path
    heldout_folder: Path
    encoder_folder: Path


def _load_corpus(pairs: Path | None, cache: Path) -> Corpus:
    if pairs is not None:
        return corpus_from_pairs(pairs)
    return corpus_from_pages(read_help_pages(fetch_help_pages(cache)))


def prepare(
    folder: str | Path,
    pairs: str | Path | None = None,
    cache: str | Path | None = None,
    vocab_size: int = 16_000,
    size: EncoderSize | None = None,
    init: EncoderInit | None = None,
    seed: int = 0,
) -> Prepared:
    """Make what is missing under `folder`, from the user's `pairs` file or (None) from the help pages fetched
    into `cache`.

    Raises:
        DataError: the corpus cannot be fetched or read.
    """
    folder, size, init = Path(folder), size or EncoderSize(), init or EncoderInit()
    prepared = Prepared(folder / "train.jsonl", folder / "heldout", folder / "encoder")
    if prepared.encoder_folder.is_dir():
        logger.info("found %s, prepared before", prepared.encoder_folder)
        return prepared
    corpus = _load_corpus(Path(pairs) if pairs else None, Path(cache or folder / "cache"))
    write_corpus(corpus, folder)
    logger.info(
        "%d training pairs, %d held-out queries, %d passages",
        len(corpus.train),
        len(corpus.queries),
        len(corpus.passages),
    )
    with tempfile.TemporaryDirectory(prefix="encoder-", dir=folder) as aside:
        tokenizer = train_tokenizer(
            training_texts(corpus), Path(aside) / "encoder", vocab_size, size.max_tokens
        )
        model = build_encoder(tokenizer, training_passages(corpus), Path(aside) / "encoder", size, init, seed)
        shutil.rmtree(prepared.encoder_folder, ignore_errors=True)
        os.replace(Path(aside) / "encoder", prepared.encoder_folder)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    logger.info(
        "tokenizer of %d ids, encoder of %.1f M parameters in %s",
        len(tokenizer),
        num_parameters / 1e6,
        prepared.encoder_folder,
    )
    return prepared


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.quickstart.prepare", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("folder", help="where everything goes")
    parser.add_argument(
        "--data",
        default=None,
        help="your own pairs (JSONL); without it the GNOME help pages are fetched with apt-get",
    )
    parser.add_argument(
        "--cache", default=None, help="where the fetched package is kept; default: FOLDER/cache"
    )
    parser.add_argument("--vocab-size", type=int, default=16_000)
    defaults = EncoderSize()
    parser.add_argument("--layers", type=int, default=defaults.num_layers)
    parser.add_argument("--hidden", type=int, default=defaults.hidden_size)
    parser.add_argument("--heads", type=int, default=defaults.num_heads)
    parser.add_argument("--intermediate", type=int, default=defaults.intermediate_size)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    setup_logging(None, is_main=True)
    size = EncoderSize(
        num_layers=given.layers,
        hidden_size=given.hidden,
        num_heads=given.heads,
        intermediate_size=given.intermediate,
    )
    prepare(given.folder, given.data or None, given.cache, given.vocab_size, size, seed=given.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
