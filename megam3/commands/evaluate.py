"""`megam3 evaluate MODEL FOLDER…`: five modes and BM25 on test sets in BEIR format, or on published ones
(`--benchmark miracl/sw`)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from megam3.checkpoint.folders import MARKER
from megam3.commands.instruction_options import add_instruction_options, given_instructions
from megam3.config.schema import EvaluationConfig
from megam3.embedder import M3Embedder
from megam3.errors import ConfigError
from megam3.model.device import pick_device
from megam3.model.folder import model_folder
from megam3.retrieval.beir import BeirDataset, read_beir
from megam3.retrieval.benchmarks import DEFAULT_CACHE, benchmark_split, fetch_benchmark
from megam3.retrieval.by_embedder import embedder_encode, embedder_tokenize
from megam3.retrieval.evaluate import MODES, check_modes, evaluate, offered_modes
from megam3.retrieval.index.build import model_fingerprint
from megam3.retrieval.index.evaluate import (
    ON_DISK_PASSAGES,
    DiskTestSet,
    count_passages,
    evaluate_on_disk,
    open_test_set,
)
from megam3.retrieval.results import EvaluationResult, group_table, overall_table


def _parser() -> argparse.ArgumentParser:
    defaults = EvaluationConfig()
    parser = argparse.ArgumentParser(
        prog="megam3 evaluate", description="Five retrieval modes and BM25 on test sets in BEIR format."
    )
    parser.add_argument("model", help="folder of an exported model")
    parser.add_argument(
        "folders", nargs="*", help="folders with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv"
    )
    parser.add_argument(
        "--benchmark",
        action="append",
        default=[],
        metavar="FAMILY/NAME",
        help="a published test set: beir/NAME, miracl/LANG, mldr/LANG, mkqa/LANG; fetched from the hub once",
    )
    parser.add_argument("--benchmark-split", default=None, help="default: the one results are published on")
    parser.add_argument(
        "--benchmark-cache", default=str(DEFAULT_CACHE), help="where they are kept (default: %(default)s)"
    )
    parser.add_argument(
        "--benchmark-source",
        default=None,
        metavar="DIR",
        help="read DIR/OWNER/NAME/… instead of the hub's repositories",
    )
    parser.add_argument(
        "--index",
        default=None,
        metavar="DIR",
        help="keep encoded passages in DIR/NAME-OF-FOLDER instead of memory, and use them again; "
        f"on its own above {ON_DISK_PASSAGES:,} passages, in FOLDER.index",
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of tables")
    parser.add_argument("--split", default=defaults.split, help="qrels/SPLIT.tsv (default: %(default)s)")
    parser.add_argument(
        "--modes",
        default=None,
        help=f"comma-separated, of {','.join(MODES)} (default: all whose heads the model has)",
    )
    parser.add_argument("--out", default=None, help="folder for one JSON file per test set")
    parser.add_argument(
        "--by",
        choices=["language", "length", "query_length"],
        action="append",
        default=[],
        help="also print a table of groups; length: of the longest relevant passage",
    )
    parser.add_argument("--query-max-tokens", type=int, default=defaults.query_max_tokens)
    parser.add_argument("--passage-max-tokens", type=int, default=defaults.passage_max_tokens)
    parser.add_argument(
        "--batch-tokens", type=int, default=None, help="encoded at a time (default: by device)"
    )
    parser.add_argument(
        "--rerank-dense", type=int, default=defaults.rerank_dense, help="Multi-vec re-ranks this many"
    )
    parser.add_argument(
        "--rerank-hybrid",
        type=int,
        default=defaults.rerank_hybrid,
        help="Dense+Sparse and All re-rank this many of each",
    )
    add_instruction_options(parser)
    parser.add_argument("--device", default=None, help="default: CUDA when there is one")
    return parser


def _check_model(path: str) -> None:
    """Refuse a training checkpoint by name: what a loader says of one does not help."""
    if (Path(path) / MARKER).exists():
        raise ConfigError(
            "model",
            path,
            "is a training checkpoint, not a model",
            f"export it first: megam3 export {path} OUT",
        )


def _test_sets(given: argparse.Namespace) -> list[BeirDataset | DiskTestSet]:
    """Folders, then benchmarks; all are read before the model is, which takes longer to load than a wrong
    name to find.

    Raises:
        ConfigError, DataError: see `read_beir` and `fetch_benchmark`.
    """
    if not given.folders and not given.benchmark:
        raise ConfigError("test sets", None, "none is named", "give a folder, or --benchmark miracl/sw")
    test_sets = [_test_set(Path(folder).expanduser(), given.split, given.index) for folder in given.folders]
    for name in given.benchmark:
        split = given.benchmark_split or benchmark_split(name)
        folder = fetch_benchmark(name, given.benchmark_cache, split, given.benchmark_source)
        test_sets.append(_test_set(folder, split, given.index))
    return test_sets


def _test_set(folder: Path, split: str, index: str | None) -> BeirDataset | DiskTestSet:
    if index is not None:
        return open_test_set(folder, split, Path(index).expanduser() / folder.resolve().name)
    if count_passages(folder) > ON_DISK_PASSAGES:
        # not with_name: `.` has none
        return open_test_set(folder, split, Path(f"{os.path.abspath(folder)}.index"))
    return read_beir(folder, split)


def _check_names(test_sets: Sequence[BeirDataset | DiskTestSet]) -> None:
    """The results of no test set would be written over those of another."""
    names = [each.name if isinstance(each, BeirDataset) else each.dataset.name for each in test_sets]
    for name in names:
        if names.count(name) > 1:
            rule = f"{names.count(name)} of the test sets are called so, and results are filed by name"
            raise ConfigError("--out", name, rule, "rename a folder, or evaluate them one by one")


def _evaluate(
    test_set: BeirDataset | DiskTestSet,
    embedder: M3Embedder,
    model: str,
    config: EvaluationConfig,
    modes: Sequence[str],
) -> EvaluationResult:
    if isinstance(test_set, BeirDataset):
        return evaluate(
            test_set, embedder_tokenize(embedder), embedder_encode(embedder, modes), config, modes
        )
    return evaluate_on_disk(
        test_set,
        embedder,
        model_fingerprint(model),
        config,
        modes,
        lambda done, total: print(f"shards encoded: {done} of {total}", file=sys.stderr, flush=True),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate and print one table; with `--out` also one JSON file per folder, named after it.

    Raises:
        ConfigError: an unusable device, a checkpoint instead of a model, a mode that is unknown or for which
            the model lacks a head.
        DataError: a test set that is not in BEIR format.
    """
    given = _parser().parse_args(argv)
    _check_model(given.model)
    device = pick_device(given.device)
    for option, value, least in (
        ("--query-max-tokens", given.query_max_tokens, 3),
        ("--passage-max-tokens", given.passage_max_tokens, 3),
        ("--batch-tokens", given.batch_tokens, 1),
        ("--rerank-dense", given.rerank_dense, 1),
        ("--rerank-hybrid", given.rerank_hybrid, 1),
    ):
        if value is not None and value < least:
            raise ConfigError(option, value, f"must be at least {least}", "leave it out")
    asked = [] if given.modes is None else [mode.strip() for mode in given.modes.split(",")]
    check_modes(asked)
    test_sets = _test_sets(given)
    if given.out is not None:
        _check_names(test_sets)
    model = model_folder(given.model)
    embedder = M3Embedder(model, device=device)
    check_modes(asked, embedder.heads)
    modes = asked or offered_modes(embedder.heads)
    instructions = given_instructions(given, model)
    if instructions:
        print(
            f"before queries: {instructions.query!r}, before passages: {instructions.passage!r}",
            file=sys.stderr,
        )
    config = EvaluationConfig(
        folders=given.folders,
        split=given.split,
        # what the model has no positions for is cut, and counted as cut
        query_max_tokens=min(given.query_max_tokens, embedder.max_tokens),
        passage_max_tokens=min(given.passage_max_tokens, embedder.max_tokens),
        query_instruction=instructions.query,
        passage_instruction=instructions.passage,
        batch_tokens=given.batch_tokens or embedder.default_batch_tokens,
        rerank_dense=given.rerank_dense,
        rerank_hybrid=given.rerank_hybrid,
    )
    console = Console()
    results = []
    for test_set in test_sets:
        result = _evaluate(test_set, embedder, model, config, modes)
        results.append(result)
        if given.out is not None:
            result.write(Path(given.out) / f"{result.dataset}.json")
    if given.json:
        print(json.dumps([asdict(result) for result in results], indent=2, ensure_ascii=False))
        return 0
    console.print(overall_table(results))
    for by in given.by:
        for result in results:
            console.print(group_table(result, by))
    return 0
