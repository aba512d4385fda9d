"""Tokenise a recipe's training data into its store, ahead of the run or on other machines.

    megam3 prepare unified                  # all of it, one process per core
    megam3 prepare unified --shard 3/16     # task 3 of a job array of 16 (slurm/prepare.sh)
    megam3 prepare unified --verify         # read a finished store through and compare every checksum

The last task of an array to end finishes the store. Killed and started again, a task continues; finished, it
does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megam3.commands.recipe import add_recipe, local_config
from megam3.config.schema import RunConfig
from megam3.data.prepare import UNIT_BYTES, PrepareProgress, prepare_data
from megam3.data.report import draw_histogram, store_facts, store_report
from megam3.data.store import open_dataset, verify_dataset
from megam3.data.tokenizer import load_tokenizer
from megam3.errors import ConfigError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megam3 prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe(parser)
    parser.add_argument(
        "--processes",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="background processes (default: one per core)",
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="prepare every N-th unit, beginning with I (from 0)",
    )
    parser.add_argument(
        "--unit-mb",
        type=int,
        default=UNIT_BYTES >> 20,
        help="text per shard, fixed when a store is begun (default: 64)",
    )
    parser.add_argument("--verify", action="store_true", help="check a finished store instead")
    parser.add_argument("--json", action="store_true", help="the reports as one JSON document")
    return parser


def main(argv: Sequence[str]) -> int:
    """Prepare, or verify; prints the report of every finished dataset.

    Raises:
        UserError: bad input, a store made from other settings, a full disk.
    """
    arguments = _parser().parse_intermixed_args(argv)
    shard = parse_shard(arguments.shard)  # not by argparse, which replaces the message of a ValueError
    config = local_config(arguments, weights=False)
    store_dir = config.store_dir
    if arguments.verify:
        return _verify(config, store_dir, as_json=arguments.json)
    tokenizer = load_tokenizer(config.model.path)
    with _bar() as bar:
        on_progress = _reporter(bar)
        size = arguments.unit_mb << 20
        manifests = prepare_data(
            config.data, tokenizer, store_dir, arguments.processes, shard, on_progress, size
        )
    num_waiting, picture = len(config.data.train) - len(manifests), store_dir / "lengths.png"
    if not num_waiting:
        draw_histogram(manifests, picture)
    if arguments.json:
        _print_json(
            store=str(store_dir),
            picture=None if num_waiting else str(picture),
            datasets=[store_facts(manifest) for manifest in manifests],
            datasets_waiting=num_waiting,
        )
        return 0
    for manifest in manifests:
        print(store_report(manifest))
    if num_waiting:
        print(f"store: {store_dir}: {num_waiting} datasets wait for units of other tasks")
    else:
        print(f"store: {store_dir}, picture: {picture}")
    return 0


def parse_shard(text: str) -> tuple[int, int]:
    """(i, n) of `i/n`.

    Raises:
        ConfigError: not two numbers, or i not below n.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    index, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if index >= count:
        raise ConfigError(
            "--shard",
            text,
            "must be I/N with I below N, from 0",
            "write --shard 0/4 for the first task of four",
        )
    return index, count


def _verify(config: RunConfig, store_dir: Path, *, as_json: bool) -> int:
    verified = []
    for dataset in config.data.train:
        opened = open_dataset(store_dir, dataset.name)
        verify_dataset(opened)
        verified.append({"name": dataset.name, "shards": len(opened.manifest.shards)})
        if not as_json:
            print(f"{dataset.name}: {len(opened.manifest.shards)} shards, all checksums match")
    if as_json:
        _print_json(store=str(store_dir), verified=verified)
    return 0


def _print_json(**facts: Any) -> None:
    print(json.dumps(facts, indent=2, ensure_ascii=False))


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[rate]}"),
    )
    return Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr))


def _reporter(bar: Progress) -> Callable[[PrepareProgress], None]:
    """A bar on a terminal, a line per unit elsewhere."""
    task = bar.add_task("preparing", total=None, rate="")

    def report(standing: PrepareProgress) -> None:
        speed = f"{standing.records_per_second:,.0f}/s"
        rate = f"{standing.records:,} records, {speed}, {standing.rejected:,} rejected"
        bar.update(
            task,
            description=standing.dataset,
            completed=standing.units_done,
            total=standing.units_total,
            rate=rate,
        )
        if not bar.console.is_terminal:
            rest = f"{standing.seconds_left:,.0f} s left"
            print(
                f"{standing.dataset}: unit {standing.units_done} of {standing.units_total}, {rate}, {rest}",
                file=sys.stderr,
            )

    return report
