"""Where the time from `python -m megam3.train` to the end of the first step goes, part by part: cold (the
store is made), warm (it is there) and resumed.

    python benchmarks/startup.py [RECIPE [key=value…]]

Without a recipe: a tiny model and forty records, so that what is left is the fixed cost of a start.
Wall-clock and processor seconds of one rank in a process of its own; on a busy machine the latter tell more.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PARTS = (
    ("megam3.train", "check_shared", "folders are shared"),
    ("megam3.build", "load_tokenizer", "tokenizer"),
    ("megam3.build", "open_on_every_rank", "data: store made or checked, plan"),
    ("megam3.build", "join", "DeepSpeed's process group"),
    ("megam3.build", "find_objective", "objective"),
    ("megam3.build", "Engine", "engine"),
    ("megam3.build", "find_start", "checkpoint found, verified, loaded"),
    ("megam3.build", "describe_environment", "env.json (versions, git)"),
    ("megam3.build", "describe_run_folder", "run folder described"),
    ("megam3.build", "plan_run", "memory plan"),
    ("megam3.build", "measure_matmul_peak", "matmul peak"),
    ("megam3.trainer", "run_step", "first step"),
)
"""(module, name in it, what it is): what is not in the list is "the rest"."""


class FirstStepDoneError(Exception):
    """Ends the measured run."""


def measure(arguments: list[str]) -> None:
    """In a fresh interpreter: import, run, and print the parts as JSON."""
    spent: dict[str, list[float]] = {}
    began, began_cpu = time.perf_counter(), time.process_time()
    interpreter = time.process_time()
    from importlib import import_module

    train = import_module("megam3.train")
    spent["imports"] = [time.perf_counter() - began, time.process_time() - began_cpu]
    for module_name, name, what in PARTS:
        module = import_module(module_name)
        setattr(module, name, timed(getattr(module, name), spent, what, ends=name == "run_step"))
    with contextlib.suppress(FirstStepDoneError):
        train.main(arguments)
    spent["all"] = [time.perf_counter() - began, time.process_time() - began_cpu]
    spent["interpreter"] = [interpreter, interpreter]
    print(json.dumps(spent))
    sys.stdout.flush()
    os._exit(0)


def timed(function: Callable, spent: dict[str, list[float]], what: str, ends: bool) -> Callable:
    """`function`, adding what it takes to `spent[what]`."""

    def call(*arguments: Any, **named: Any) -> Any:
        began, began_cpu = time.perf_counter(), time.process_time()
        result = function(*arguments, **named)
        own = spent.setdefault(what, [0.0, 0.0])
        own[0] += time.perf_counter() - began
        own[1] += time.process_time() - began_cpu
        if ends:
            raise FirstStepDoneError
        return result

    return call


def measure_in_a_process(arguments: list[str]) -> dict[str, list[float]]:
    """The parts of one start."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="*")
    given = parser.parse_args().recipe
    with tempfile.TemporaryDirectory() as name:
        if not given:
            sys.path.insert(0, str(ROOT))
            from tests.launches import make_workplace

            given = [make_workplace(Path(name)).recipe]
        settings = [*given, "data.num_workers=1"]
        starts = {"cold": [*settings, f"name=cold-{os.getpid()}"]}
        starts["warm"] = [*settings, f"name=warm-{os.getpid()}"]
        starts["resumed"] = [*settings, f"name=resumed-{os.getpid()}", "train.steps=9"]
        found = {}
        for kind, arguments in starts.items():
            if kind == "resumed":
                environ = {**os.environ, "PYTHONPATH": str(ROOT)}
                command = [sys.executable, "-m", "megam3.train", *arguments[:-1], "train.steps=4"]
                subprocess.run(command, env=environ, check=True, stderr=subprocess.DEVNULL)
            found[kind] = measure_in_a_process(arguments)
    print("| part | " + " | ".join(f"{kind}: wall s | processor s" for kind in found) + " |")
    print("|" + "---|" * (1 + 2 * len(found)))
    for what in ["interpreter", "imports", *(what for _, _, what in PARTS), "all"]:
        cells = [f"{seconds:.2f}" for spent in found.values() for seconds in spent.get(what, [0.0, 0.0])]
        print(f"| {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
