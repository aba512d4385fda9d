"""Kill -9 at random times and after random steps of training, start again, and end with the losses of a run
that was never disturbed.

Five kills, or as many as MEGAM3_KILLS says. MEGAM3_KILL_DATA=pairs.jsonl trains on that file instead of
made-up pairs.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launches import HELD, ROOT, Workplace, make_workplace

STEPS = 60
ARGUMENTS = (
    f"train.steps={STEPS}",
    "train.save_every_steps=10",
    "train.keep_checkpoints=2",
    "data.num_workers=2",
)


def start(place: Workplace, name: str, **held: str) -> subprocess.Popen:
    """One process on one rank, in a session of its own, so that its data workers can be killed with it;
    `held` is what the program HELD reads."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **held}
    program = ["-c", HELD] if held else ["-m", "megam3.train"]
    command = [sys.executable, *program, place.recipe, f"name={name}", *ARGUMENTS]
    data = os.environ.get("MEGAM3_KILL_DATA")
    if data:
        command += [
            f"data.train.0.paths={json.dumps([str(Path(data).resolve())])}",
            f"data.store_dir={place.folder}/real",
        ]
    return subprocess.Popen(
        command,
        env=environ,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> None:
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said


@pytest.mark.slow
def test_killed_training_ends_with_the_losses_of_an_undisturbed_run(tmp_path: Path) -> None:
    num_kills = int(os.environ.get("MEGAM3_KILLS", "5"))
    place, rng = make_workplace(tmp_path), random.Random(0)
    finish(start(place, "store"))  # tokenises; from here on a start costs every run the same
    before = time.monotonic()
    finish(start(place, "whole"))
    whole_seconds = time.monotonic() - before
    by_time, at_step, run = list[int](), list[int](), 0

    def start_anew() -> None:
        """The run to its end, and on with another."""
        nonlocal run
        finish(start(place, f"killed-{run}"))
        check_equal(place, f"killed-{run}")
        run += 1

    while len(by_time) + len(at_step) < num_kills:
        if len(at_step) < len(by_time):
            if not (free := set(range(count_steps(place, f"killed-{run}") + 1, STEPS)) - set(at_step)):
                start_anew()
                continue
            at_step.append(rng.choice(sorted(free)))
            kill_at(place, f"killed-{run}", at_step[-1])
        elif kill_after(place, f"killed-{run}", rng.uniform(0.3, 1.0) * whole_seconds):
            by_time.append(count_steps(place, f"killed-{run}"))
        else:
            start_anew()  # it had ended before: nothing was killed
    start_anew()
    print(f"{num_kills} kills over {run} runs of {STEPS} steps: by time, with these steps logged: {by_time};"
          f" right after these steps: {at_step}")  # fmt: skip
    assert len(set(at_step)) == num_kills // 2, "kills at different steps"


def kill_at(place: Workplace, name: str, step: int) -> None:
    """Start, and kill right after the step, at which the run stands still until then."""
    hold = place.folder / "hold"
    hold.touch()
    process = start(place, name, HELD_AT=str(step), HELD_WHILE=str(hold))
    end = time.monotonic() + 240
    while process.poll() is None and count_steps(place, name) < step and time.monotonic() < end:
        time.sleep(0.02)
    assert kill(process), "the run ended before the step"
    assert count_steps(place, name) == step


def kill_after(place: Workplace, name: str, seconds: float) -> bool:
    """Start, and kill after so long, start-up included; whether the run was still there."""
    process = start(place, name)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return kill(process)


def kill(process: subprocess.Popen) -> bool:
    """Kill -9 the process and its data workers; False if it had ended well."""
    if process.poll() is not None:
        finish(process)
        return False
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return True


def count_steps(place: Workplace, name: str) -> int:
    """Steps a run has logged so far."""
    return len(place.rows(name)) if (place.run(name) / "metrics.jsonl").exists() else 0


def check_equal(place: Workplace, name: str) -> None:
    assert place.figures(name) == place.figures("whole")
    assert [row["step"] for row in place.rows(name)] == list(range(1, STEPS + 1))
