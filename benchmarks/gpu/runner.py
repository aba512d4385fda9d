"""Runs the pieces one after the other, each in processes of its own, and keeps what is done.

    results/gpu-pieces.jsonl   one line a piece, as soon as it ends: {"name": …, "machine": …, "figures": {…}}
                               or {"name": …, "machine": …, "failure": "out of memory"}
    results/gpu.md             the table of this machine's lines, written after each

(With `--device cpu --tiny` gpu-cpu-tiny-pieces.jsonl and gpu-cpu-tiny.md.) A run that was interrupted skips
the pieces that have a line of the same kind of GPU and the same torch. A piece that fails has one too, with
its reason; `--again` runs those anew. Nothing is downloaded: a peer is measured where a variable names an
interpreter that has it (MEGAM3_BENCH_PYTHON_PYLATE=…, see benchmarks/environments.py) or `python -m
benchmarks` has installed it; elsewhere its line says that it is missing, and the next call asks again.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.environments import find_python, library_of, variable_of
from benchmarks.gpu.pieces import BGE_M3, TINY, Piece, list_pieces
from benchmarks.gpu.table import write_table
from benchmarks.measure import RESULTS, ROOT
from benchmarks.models import make_model_folder

PIECE_SECONDS = 590.0
"""Jobs on shared nodes are often cut at ten minutes: a piece is ended before that, and says so."""


def read_done(file: Path, machine: str) -> dict[str, dict]:
    """The pieces that have a line of this machine, by name; a line cut by a kill counts as none."""
    done: dict[str, dict] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry.get("machine") == machine:
            done[entry["name"]] = entry
    return done


def run_piece(piece: Piece, common: dict, seconds: float = PIECE_SECONDS) -> dict:
    """The line of one piece: its figures, or why there are none."""
    python = find_python(piece.environment) if piece.environment else sys.executable
    if python is None:
        return {"name": piece.name, "failure": _missing(piece.environment), "missing": True}
    with tempfile.TemporaryDirectory() as folder:
        spec, answer = Path(folder) / "spec.json", Path(folder) / "answer.json"
        spec.write_text(json.dumps({**piece.spec, **common}))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        device = common.get("device", "cpu")
        processes, logs = [], []
        for rank in range(piece.num_gpus):
            environment = {
                **os.environ,
                # a node with GPUs also shows that everything runs on a CPU
                **({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}),
                "DS_ACCELERATOR": device,
                "HF_HUB_OFFLINE": "1",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(piece.num_gpus),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            logs.append(open(Path(folder) / f"rank-{rank}.log", "w+"))  # noqa: SIM115 - closed below
            command = [python, "-m", f"benchmarks.gpu.{piece.module}", str(spec), str(answer)]
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=logs[-1], stderr=subprocess.STDOUT
                )
            )
        failed, failure = _wait(processes, seconds)
        if failure:
            texts = [Path(log.name).read_text(errors="replace") for log in logs]
            # what the rank that failed first says comes before what its peers say about it
            failure = _reason(failure, [*texts[failed:], *texts[:failed]])
        for log in logs:
            log.close()
        if failure:
            return {"name": piece.name, "failure": failure}
        return {"name": piece.name, "figures": json.loads(answer.read_text())}


def _missing(environment: str) -> str:
    variable, library = variable_of(environment), library_of(environment)
    return f"missing: {variable} names no interpreter that has {library} (benchmarks/environments.py)"


def _is_wanted(piece: Piece, line: dict | None, again: bool) -> bool:
    """Whether a piece is still to be run, given its line."""
    if line is None:
        return True
    if line.get("missing") and find_python(piece.environment):
        return True
    return again and "failure" in line


def _wait(processes: Sequence[subprocess.Popen], seconds: float) -> tuple[int, str]:
    """Wait for all; which rank failed first and why, or an empty reason. All have ended afterwards."""
    failed, failure = 0, ""
    deadline = time.monotonic() + seconds
    try:
        while not failure:
            # all are asked in turn: the peers of one that failed wait for it in a collective call
            codes = [process.poll() for process in processes]
            broken = [rank for rank, code in enumerate(codes) if code]
            if broken:
                failed, failure = broken[0], f"exit code {codes[broken[0]]}"
            elif None not in codes:
                break
            elif time.monotonic() > deadline:
                failure = f"not done after {seconds:g} seconds"
            else:
                time.sleep(0.05)
    finally:
        # also after Ctrl-C
        for process in processes:
            process.kill()
            process.wait()
    return failed, failure


ERROR = re.compile(r"^(?:\[rank\d+\]: ?)?([\w.]*(?:Error|Exception|Interrupt)\b.*)")
"""The line in which a traceback ends; torch puts the rank before it where there are several."""


def _reason(failure: str, logs: Sequence[str]) -> str:
    """In a word where the logs tell, else the last error of the first that has one, else its last line."""
    if any("OutOfMemoryError" in text or "out of memory" in text for text in logs):
        return "out of memory"
    errors = [match[1] for text in logs for line in text.splitlines()[::-1] if (match := ERROR.match(line))]
    lines = errors or [line for text in logs for line in text.splitlines()[-1:] if line.strip()]
    return f"{failure}: {lines[0]}" if lines else failure


def main(argv: Sequence[str]) -> None:
    """`python -m benchmarks gpu`: measure what has not been measured on this node, then write the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=main.__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny model and texts: shows that all of it runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of lines and table")
    parser.add_argument("--max-pieces", type=int, help="stop after so many pieces; a later call goes on")
    parser.add_argument("--only", default="", help="pieces whose name contains this")
    parser.add_argument("--again", action="store_true", help="run pieces that failed once more")
    arguments = parser.parse_args(argv)
    has_device = arguments.device == "cuda"
    if has_device and not torch.cuda.is_available():
        parser.error("no CUDA device is there; --device cpu --tiny shows that everything runs")
    num_gpus = torch.cuda.device_count() if has_device else 1
    arguments.results.mkdir(parents=True, exist_ok=True)
    stem = "-".join(["gpu", *([] if has_device else ["cpu"]), *(["tiny"] if arguments.tiny else [])])
    lines, page = arguments.results / f"{stem}-pieces.jsonl", arguments.results / f"{stem}.md"
    machine = find_machine(has_device)
    folder = make_model_folder(arguments.results / "models", TINY if arguments.tiny else BGE_M3)
    common = {"device": arguments.device, "model_folder": str(folder.resolve())}
    done = read_done(lines, machine)
    title = f"{num_gpus} × {machine}" if has_device else machine
    wanted = [
        piece
        for piece in list_pieces(num_gpus, arguments.tiny, has_device)
        if arguments.only in piece.name and _is_wanted(piece, done.get(piece.name), arguments.again)
    ]
    for number, piece in enumerate(wanted[: arguments.max_pieces], start=1):
        print(f"[{number}/{len(wanted)}] {piece.name}", flush=True)
        entry = {**run_piece(piece, common), "machine": machine}
        done[piece.name] = entry
        with lines.open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
        print(f"  {entry.get('failure') or entry['figures']}", flush=True)
        write_table(page, done.values(), title)
    table = write_table(page, done.values(), title)
    print(f"{len(done)} pieces; table in {table}")


def find_machine(has_device: bool) -> str:
    """What makes two measurements comparable: the kind of GPU, and torch."""
    if not has_device:
        return f"CPU, {os.cpu_count()} cores: shows that the pieces run, not how fast"
    # in a process of its own: this one would hold a context on the first GPU while the pieces run
    command = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    name = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return f"{name}, torch {torch.__version__}"
