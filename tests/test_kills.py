"""Kill -9 at random moments of training, start again, and end with the losses of a run that was never
disturbed.

Five kills, or as many as MEGAM3_KILLS says. MEGAM3_KILL_DATA=pairs.jsonl trains on that file instead of
made-up pairs.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launches import ROOT, Workplace, make_workplace

STEPS = 60
ARGUMENTS = (
    f"train.steps={STEPS}",
    "train.save_every_steps=10",
    "train.keep_checkpoints=2",
    "data.num_workers=2",
)


def start(place: Workplace, name: str) -> subprocess.Popen:
    """One process on one rank, in a session of its own, so that its data workers can be killed with it."""
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megam3.train", place.recipe, f"name={name}", *ARGUMENTS]
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
    killed_after, run = [], 0
    while len(killed_after) < num_kills:
        name = f"killed-{run}"
        logged = count_steps(place, name)
        process = start(place, name)
        # half of the kills come at a random time, start-up included, half right after a random step
        target = rng.randint(logged + 1, STEPS) if len(killed_after) % 2 and logged < STEPS else STEPS + 1
        deadline = time.monotonic() + (60 if target <= STEPS else rng.uniform(0.3, 1.0) * whole_seconds)
        while process.poll() is None and time.monotonic() < deadline and count_steps(place, name) < target:
            time.sleep(0.02)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed_after.append(count_steps(place, name))
            continue
        finish(process)
        check_equal(place, name)
        run += 1
    finish(start(place, f"killed-{run}"))
    check_equal(place, f"killed-{run}")
    print(
        f"{num_kills} kills over {run + 1} runs of {STEPS} steps, after these steps were logged:"
        f" {killed_after}"
    )
    assert len(set(killed_after)) > 2, "kills at different points of the run"


def count_steps(place: Workplace, name: str) -> int:
    """Steps a run has logged so far."""
    return len(place.rows(name)) if (place.run(name) / "metrics.jsonl").exists() else 0


def check_equal(place: Workplace, name: str) -> None:
    assert place.figures(name) == place.figures("whole")
    assert [row["step"] for row in place.rows(name)] == list(range(1, STEPS + 1))
