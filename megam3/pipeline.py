"""Stages of `megam3` one after the other, restartable anywhere: what `megam3 pipeline FILE` reads and runs.

    folder: runs/chain
    inputs: {pairs: data/pairs.jsonl, start: models/encoder}
    stages:
      - name: mine
        command: mine
        arguments: "{inputs.pairs} --model {inputs.start} --output {output} --range 0-50"
      - name: train
        command: train
        arguments: "recipe.yaml model.path={inputs.start} 'data.train.0.paths=[{mine.output}]'"
      - name: export
        command: export
        arguments: "{train.checkpoint} {output}"

A stage owns `folder/NAME/`: its output, `log.txt`, and `done.json` once it has finished. References are
`{inputs.X}`, `{output}` (where this stage must write), `{STAGE.output}` and, of a train stage,
`{STAGE.checkpoint}` (its newest). Arguments are split as in a shell, but no shell ever reads them.

A stage is skipped when `done.json` holds the fingerprint it has now: of its command, its resolved arguments,
the bytes of those arguments that are files, and the fingerprint of the stage before it. So a change reruns
its stage and all after it; what they had written is renamed `NAME.old-1`, never deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megam3.checkpoint.folders import MARKER, step_names
from megam3.data.source import format_of
from megam3.errors import DataError, TrainingError
from megam3.files import file_digest, read_json, write_json
from megam3.model.hub import is_hub_id, resolve_model
from megam3.obs.metrics import read_metrics
from megam3.obs.stop import EXIT_REQUEUE, EXIT_STOPPED
from megam3.pipeline_file import REFERENCE, Pipeline, Stage
from megam3.retrieval.results import read_result

LOG, DONE, STARTED = "log.txt", "done.json", "started.json"
RESUMABLE = ("train", "mine", "add-teacher-scores")
"""Commands that continue what a killed process of theirs has left; the others want no output to be there."""


@dataclass(kw_only=True)
class StageResult:
    """A line of the table at the end."""

    stage: Stage
    folder: Path
    status: str
    """finished, skipped (finished by an earlier start), stopped, or failed."""
    seconds: float
    """Of all starts with the same arguments together."""
    output: Path
    code: int = 0
    """Exit code of the stage's process."""


def figures(result: StageResult) -> dict[str, Any]:
    """The main figures of a stage: last loss, negatives, ndcg@10 by test set and mode; empty where there are
    none."""
    command, output = result.stage.command, result.output
    if command == "train" and (output / "metrics.jsonl").is_file():
        rows = [row for row in read_metrics(output / "metrics.jsonl") if "loss/total" in row]
        return {"step": rows[-1]["step"], "loss": rows[-1]["loss/total"]} if rows else {}
    if command == "mine" and (report := Path(f"{output}.report.json")).is_file():
        found = read_json(report)
        return {"queries": found["queries"], "negatives": found["negatives"]}
    if command == "evaluate" and output.is_dir():
        results = [read_result(path) for path in sorted(output.glob("*.json"))]
        return {
            "ndcg@10": {
                each.dataset: {mode: scores.overall["ndcg@10"] for mode, scores in each.modes.items()}
                for each in results
            }
        }
    return {}


def figures_text(result: StageResult) -> str:
    """The same in one line."""
    found = figures(result)
    if "loss" in found:
        return f"step {found['step']}, loss {found['loss']:.4f}"
    if "negatives" in found:
        return f"{found['queries']} queries, {found['negatives']} negatives"
    return "; ".join(
        f"{dataset} ndcg@10 " + " ".join(f"{mode} {score:.3f}" for mode, score in modes.items())
        for dataset, modes in found.get("ndcg@10", {}).items()
    )


def stage_facts(result: StageResult) -> dict[str, Any]:
    """A line of the table at the end, for programs."""
    return {
        "name": result.stage.name,
        "command": result.stage.command,
        "status": result.status,
        "seconds": round(result.seconds, 1),
        "exit_code": result.code,
        "output": str(result.output),
        "log": str(result.folder / LOG),
        "figures": figures(result),
    }


def stage_folder(pipeline: Pipeline, name: str) -> Path:
    """Where a stage writes everything of its own."""
    return pipeline.folder / name


def output_of(pipeline: Pipeline, stage: Stage) -> Path:
    """What `{STAGE.output}` stands for: a JSONL file, a model folder, a run folder or a folder of results."""
    if stage.command == "train":
        return stage_folder(pipeline, stage.name) / stage.name  # megam3 train makes output_dir/name
    suffix = ".jsonl" if stage.command in ("mine", "add-teacher-scores") else ""
    return stage_folder(pipeline, stage.name) / f"output{suffix}"


def checkpoint_of(pipeline: Pipeline, stage: Stage) -> Path:
    """The newest whole checkpoint of a train stage.

    Raises:
        DataError: there is none.
    """
    root = output_of(pipeline, stage) / "checkpoints"
    whole = [name for name in step_names(str(root)) if (root / name / MARKER).exists()]
    if not whole:
        rule, remedy = "holds no whole checkpoint", f"read {stage_folder(pipeline, stage.name) / LOG}"
        raise DataError(f"{{{stage.name}.checkpoint}}", str(root), rule, remedy)
    return root / whole[-1]


def resolve(pipeline: Pipeline, stage: Stage) -> list[str]:
    """The stage's arguments with references replaced; those of `train` get the run folder too.

    Raises:
        DataError: an input or the output of an earlier stage is not there.
    """

    def value_of(found: re.Match[str]) -> str:
        owner, output = found["owner"], found["output"]
        if output is None:
            return str(output_of(pipeline, stage))
        if owner == "inputs":
            path, remedy = Path(pipeline.inputs[output]), f"correct inputs.{output}"
        else:
            earlier = pipeline.stage(owner)
            path = (checkpoint_of if output == "checkpoint" else output_of)(pipeline, earlier)
            remedy = f"read {stage_folder(pipeline, owner) / LOG}"
        if not path.exists():
            raise DataError(f"stage {stage.name}, {found[0]}", str(path), "does not exist", remedy)
        return str(path)

    arguments = [REFERENCE.sub(value_of, argument) for argument in stage.arguments]
    if stage.command == "train":
        arguments += [f"output_dir={stage_folder(pipeline, stage.name)}", f"name={stage.name}"]
    return arguments


def fingerprint(stage: Stage, arguments: Sequence[str], output: Path, before: str) -> str:
    """SHA-256 over what decides a stage's result; reads every file among the arguments once (about 1 s a GB).

    Files that a recipe names, those in folders, and the stage's own `output` are not looked at.
    """
    files = {
        argument: file_digest(argument)
        for argument in arguments
        if os.path.isfile(argument) and argument != str(output)
    }
    facts = [stage.command, list(arguments), files, before]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def run_pipeline(pipeline: Pipeline, say: Callable[[str], None]) -> Iterator[StageResult]:
    """Run or skip one stage after the other; yields each result as soon as it is known.

    After a result that is failed or stopped nothing more is run. The caller turns those two into an exit
    code, by `check_finished`.

    Raises:
        DataError: an input, or the output of an earlier stage, is not there.
    """
    pipeline = _with_local_inputs(pipeline)
    before = ""
    for stage in pipeline.stages:
        arguments = resolve(pipeline, stage)
        before = fingerprint(stage, arguments, output_of(pipeline, stage), before)
        result = _finished_earlier(pipeline, stage, before) or _run(pipeline, stage, arguments, before, say)
        yield result
        if result.status in ("failed", "stopped"):
            return


def _with_local_inputs(pipeline: Pipeline) -> Pipeline:
    """Inputs as paths that are there, models of the hub downloaded: before the first stage, which may run for
    days."""
    inputs = dict(pipeline.inputs)
    for stage in pipeline.stages:
        for name in stage.input_names:
            given = inputs[name]
            if Path(given).exists():
                continue
            if format_of(given) is not None or not is_hub_id(given):
                where = f"inputs.{name} of stage {stage.name}"
                raise DataError(where, given, "does not exist", "correct the path")
            inputs[name] = resolve_model(given).folder
    return replace(pipeline, inputs=inputs)


def check_finished(result: StageResult) -> None:
    """Raise for a stage that failed.

    Raises:
        TrainingError: names the stage's log and quotes its last line.
    """
    if result.status == "failed":
        log = result.folder / LOG
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        rule = f"failed and said last: {last[:300]}"
        raise TrainingError("stage", result.stage.name, rule, f"read {log}, then give the same command again")


def _finished_earlier(pipeline: Pipeline, stage: Stage, mark: str) -> StageResult | None:
    folder = stage_folder(pipeline, stage.name)
    try:
        done = read_json(folder / DONE)
    except (OSError, ValueError):
        return None
    if done.get("fingerprint") != mark or not output_of(pipeline, stage).exists():
        return None
    return StageResult(
        stage=stage,
        folder=folder,
        status="skipped",
        seconds=done["seconds"],
        output=output_of(pipeline, stage),
    )


def _run(
    pipeline: Pipeline, stage: Stage, arguments: list[str], mark: str, say: Callable[[str], None]
) -> StageResult:
    folder = stage_folder(pipeline, stage.name)
    spent = _make_room(pipeline, stage, mark)
    write_json(folder / STARTED, {"fingerprint": mark, "arguments": arguments, "seconds": spent})
    say(f"{stage.name}: megam3 {stage.command} {shlex.join(arguments)}  (log: {folder / LOG})")
    start = time.monotonic()
    command = [sys.executable, "-m", "megam3", stage.command, *arguments]
    with open(folder / LOG, "ab") as log, _signals_passed_on() as pass_on_to:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        pass_on_to(process)
        code = process.wait()
    seconds = spent + time.monotonic() - start
    status = {0: "finished", EXIT_REQUEUE: "stopped", EXIT_STOPPED: "stopped"}.get(code, "failed")
    record = {"fingerprint": mark, "arguments": arguments, "seconds": round(seconds, 1)}
    write_json(folder / (DONE if status == "finished" else STARTED), record)
    return StageResult(
        stage=stage,
        folder=folder,
        status=status,
        seconds=seconds,
        output=output_of(pipeline, stage),
        code=code,
    )


def _make_room(pipeline: Pipeline, stage: Stage, mark: str) -> float:
    """The stage's folder, ready for a start; returns the seconds that earlier starts of the work took."""
    folder = stage_folder(pipeline, stage.name)
    try:
        earlier = read_json(folder / STARTED)
    except (OSError, ValueError):
        earlier = {}
    if earlier.get("fingerprint") == mark:
        output = output_of(pipeline, stage)
        if stage.command not in RESUMABLE and output.is_dir():
            shutil.rmtree(output)  # by a stage of the same arguments that did not finish
        (folder / DONE).unlink(missing_ok=True)
        return float(earlier["seconds"])
    if folder.exists():
        number = 1
        while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(aside)
    folder.mkdir(parents=True)
    return 0.0


@contextmanager
def _signals_passed_on() -> Iterator[Callable[[subprocess.Popen], None]]:
    """What Slurm or a user sends to this process ends the stage in its own way: `train` saves and leaves.

    The caller names the process it has started; a signal that came while it started is passed on then.
    """
    processes: list[subprocess.Popen] = []
    early: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        if not processes:
            early.append(number)
        for process in processes:
            process.send_signal(number)

    def pass_on_to(process: subprocess.Popen) -> None:
        processes.append(process)
        for number in early:
            process.send_signal(number)

    wanted = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, pass_on) for number in wanted]
    try:
        yield pass_on_to
    except BaseException:  # Ctrl-C reached the stage too, as it is of the same terminal
        for process in processes:
            process.wait()
        raise
    finally:
        for number, handler in zip(wanted, before, strict=True):
            signal.signal(number, handler)
