"""`megam3 pipeline FILE`: the stages of a YAML file one after the other, each where the last start left off.

    megam3 pipeline examples/pipeline/pipeline.yaml            run, or continue
    megam3 pipeline examples/pipeline/pipeline.yaml --check    read the file, list the stages, run nothing

Every stage is a `megam3` command in one process of its own, with its output and log.txt below FOLDER/NAME.
Finished ones are skipped; a changed argument or input file runs its stage and all after it again. Exit codes:
0 finished, 2 bad input or a failed stage, 85 and 143 as `megam3 train`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megam3.errors import UserError
from megam3.pipeline import StageResult, check_finished, figures_text, run_pipeline, stage_facts
from megam3.pipeline_file import Pipeline, read_pipeline


def main(argv: Sequence[str]) -> int:
    """Run, print the table, return the exit code.

    Raises:
        ConfigError: of the file.
        DataError: an input, or the output of a stage, is not there.
        TrainingError: a stage failed.
    """
    parser = argparse.ArgumentParser(
        prog="megam3 pipeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="YAML with folder, inputs and stages")
    parser.add_argument("--check", action="store_true", help="read FILE and list its stages")
    parser.add_argument(
        "--json", action="store_true", help="the table as one JSON document; what runs is told on stderr"
    )
    given = parser.parse_args(argv)
    pipeline = read_pipeline(given.file)
    if given.check:
        _print_stages(pipeline, as_json=given.json)
        return 0
    results: list[StageResult] = []
    place = sys.stderr if given.json else sys.stdout
    try:
        for result in run_pipeline(pipeline, lambda line: print(line, file=place, flush=True)):
            results.append(result)
    except UserError:
        _print_results(pipeline, results, as_json=given.json)
        raise
    _print_results(pipeline, results, as_json=given.json)
    check_finished(results[-1])
    return results[-1].code


def _print_stages(pipeline: Pipeline, *, as_json: bool) -> None:
    """What would run, references still in the arguments."""
    if as_json:
        _print_json(pipeline, [asdict(stage) for stage in pipeline.stages])
        return
    for stage in pipeline.stages:
        print(f"{stage.name}: megam3 {stage.command} {' '.join(stage.arguments)}")


def _print_results(pipeline: Pipeline, results: Sequence[StageResult], *, as_json: bool) -> None:
    if as_json:
        _print_json(pipeline, [stage_facts(result) for result in results])
    else:
        Console().print(stage_table(results))


def _print_json(pipeline: Pipeline, stages: list[dict[str, Any]]) -> None:
    print(json.dumps({"folder": str(pipeline.folder), "stages": stages}, indent=2, ensure_ascii=False))


def stage_table(results: Sequence[StageResult]) -> Table:
    """One row a stage: what it was, how long it took, how it ended, its main figures."""
    table = Table(title="pipeline", title_justify="left")
    for heading in ("stage", "command", "seconds", "status", "figures"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for result in results:
        seconds = f"{result.seconds:.1f}"
        table.add_row(result.stage.name, result.stage.command, seconds, result.status, figures_text(result))
    return table
