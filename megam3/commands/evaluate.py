"""`megam3 evaluate MODEL FOLDER…`: five modes and BM25 on test sets in BEIR format."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from megam3.config.schema import EvaluationConfig
from megam3.embedder import M3Embedder
from megam3.errors import ConfigError
from megam3.retrieval.beir import read_beir
from megam3.retrieval.by_embedder import embedder_encode, embedder_tokenize
from megam3.retrieval.evaluate import MODES, check_modes, evaluate
from megam3.retrieval.results import group_table, overall_table


def _parser() -> argparse.ArgumentParser:
    defaults = EvaluationConfig()
    parser = argparse.ArgumentParser(
        prog="megam3 evaluate", description="Five retrieval modes and BM25 on test sets in BEIR format."
    )
    parser.add_argument("model", help="folder of an exported model")
    parser.add_argument(
        "folders", nargs="+", help="folders with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv"
    )
    parser.add_argument("--split", default=defaults.split, help="qrels/SPLIT.tsv (default: %(default)s)")
    parser.add_argument("--modes", default=",".join(MODES), help="comma-separated (default: %(default)s)")
    parser.add_argument("--out", default=None, help="folder for one JSON file per test set")
    parser.add_argument(
        "--by",
        choices=["language", "length"],
        action="append",
        default=[],
        help="also print a table of groups",
    )
    parser.add_argument("--query-max-tokens", type=int, default=defaults.query_max_tokens)
    parser.add_argument("--passage-max-tokens", type=int, default=defaults.passage_max_tokens)
    parser.add_argument("--batch-tokens", type=int, default=defaults.batch_tokens)
    parser.add_argument(
        "--rerank-dense", type=int, default=defaults.rerank_dense, help="Multi-vec re-ranks this many"
    )
    parser.add_argument(
        "--rerank-hybrid",
        type=int,
        default=defaults.rerank_hybrid,
        help="Dense+Sparse and All re-rank this many of each",
    )
    parser.add_argument("--device", default=None, help="default: CUDA when there is one")
    return parser


def _check_model(path: str) -> None:
    """Refuse a training checkpoint by name: what a loader says of one does not help."""
    if (Path(path) / "COMPLETE").exists():  # the marker that checkpoint.py writes
        raise ConfigError(
            "model",
            path,
            "is a training checkpoint, not a model",
            f"export it first: megam3 export {path} OUT",
        )


def _device(name: str | None) -> torch.device | None:
    """The device to compute on; None leaves the choice to the embedder."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            "--device", name, f"cannot be used ({reason})", "use cpu, or leave it out"
        ) from None
    return device


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print one table; with `--out` also one JSON file per folder, named after it.

    Raises:
        ConfigError: an unusable device, a checkpoint instead of a model, an unknown mode.
        DataError: a test set that is not in BEIR format.
    """
    given = _parser().parse_args(argv)
    _check_model(given.model)
    device = _device(given.device)
    modes = [mode.strip() for mode in given.modes.split(",")]
    check_modes(modes)
    config = EvaluationConfig(
        folders=given.folders,
        split=given.split,
        query_max_tokens=given.query_max_tokens,
        passage_max_tokens=given.passage_max_tokens,
        batch_tokens=given.batch_tokens,
        rerank_dense=given.rerank_dense,
        rerank_hybrid=given.rerank_hybrid,
    )
    datasets = [read_beir(folder, given.split) for folder in given.folders]
    embedder = M3Embedder(given.model, device=device)
    console = Console()
    results = []
    for dataset in datasets:
        result = evaluate(dataset, embedder_tokenize(embedder), embedder_encode(embedder), config, modes)
        results.append(result)
        if given.out is not None:
            result.write(Path(given.out) / f"{result.dataset}.json")
    console.print(overall_table(results))
    for by in given.by:
        for result in results:
            console.print(group_table(result, by))
    return 0
