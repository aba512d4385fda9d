"""`megam3 pipeline FILE`: the stages of a YAML file one after the other, each where the last start left off.

    megam3 pipeline examples/pipeline/pipeline.yaml            run, or continue
    megam3 pipeline examples/pipeline/pipeline.yaml --check    read the file, list the stages, run nothing

Every stage is a `megam3` command in one process of its own, with its output and log.txt below FOLDER/NAME.
Finished ones are skipped; a changed argument or input file runs its stage and all after it again. Exit codes:
0 finished, 2 bad input or a failed stage, 85 and 143 as `megam3 train`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from megam3.dist.env import prepare_environment

# the reader of checkpoints loads DeepSpeed, which looks for an accelerator while it is imported
prepare_environment(os.environ)

from rich.console import Console
from rich.table import Table

from megam3.errors import UserError
from megam3.pipeline import StageResult, check_finished, figures, run_pipeline
from megam3.pipeline_file import read_pipeline


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
    given = parser.parse_args(argv)
    pipeline = read_pipeline(given.file)
    if given.check:
        for stage in pipeline.stages:
            print(f"{stage.name}: megam3 {stage.command} {' '.join(stage.arguments)}")
        return 0
    results: list[StageResult] = []
    try:
        for result in run_pipeline(pipeline, lambda line: print(line, flush=True)):
            results.append(result)
    except UserError:
        Console().print(stage_table(results))
        raise
    Console().print(stage_table(results))
    check_finished(results[-1])
    return results[-1].code


def stage_table(results: Sequence[StageResult]) -> Table:
    """One row a stage: what it was, how long it took, how it ended, its main figures."""
    table = Table(title="pipeline", title_justify="left")
    for heading in ("stage", "command", "seconds", "status", "figures"):
        table.add_column(heading, justify="right" if heading == "seconds" else "left")
    for result in results:
        seconds = f"{result.seconds:.1f}"
        table.add_row(result.stage.name, result.stage.command, seconds, result.status, figures(result))
    return table
