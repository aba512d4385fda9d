"""Faults at random moments of a two-rank run under DeepSpeed's launcher, drawn from a seed; the run is
started again until it ends.

What must hold after each: everything ends by itself in time, the next start goes on from the newest whole
checkpoint, and in the end the figures are those of a run that was never disturbed, bit for bit.

    MEGAM3_FAULTS=100 MEGAM3_FAULT_SEED=7 python -m pytest -s tests/test_faults.py

prints a table by fault.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from megam3.dist.env import free_port
from tests.launches import ROOT, Workplace, make_workplace
from tests.test_supervision import is_alive

STEPS = 40
ARGUMENTS = (
    f"train.steps={STEPS}",
    "train.save_every_steps=5",
    "train.keep_checkpoints=2",
    "train.log_every_steps=1",
    "train.timeout_seconds=15",
    "data.num_workers=1",
    "engine.template=zero2",
)
TARGETS = ("rank 0", "rank 1", "worker", "launcher", "runner", "all")
SIGNALS = {"kill -9": signal.SIGKILL, "stop": signal.SIGSTOP}
END_SECONDS = 150


def start(place: Workplace, name: str, log: Path) -> subprocess.Popen:
    """Two ranks with DeepSpeed's launcher, everything they say in `log`."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2"]
    command += ["--master_port", str(free_port()), "--module", "megam3.train", place.recipe, f"name={name}"]
    with log.open("w") as stream:
        return subprocess.Popen(
            [*command, *ARGUMENTS],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def processes_of(run: subprocess.Popen) -> dict[str, list[psutil.Process]]:
    """The processes of a run by what they are; lists are empty while they have not started."""
    found: dict[str, list[psutil.Process]] = {name: [] for name in TARGETS}
    found["runner"] = [psutil.Process(run.pid)]
    for child in psutil.Process(run.pid).children(recursive=True):
        try:
            line, rank = child.cmdline(), child.environ().get("RANK")
        except psutil.Error:
            continue
        if "deepspeed.launcher.launch" in line:
            found["launcher"].append(child)
        elif "megam3.train" in line and rank is not None:
            found[f"rank {rank}"].append(child)
        elif any(part.startswith("megam3.data") for part in line):
            found["worker"].append(child)
    found["all"] = [each for name in TARGETS if name != "all" for each in found[name]]
    return found


def inject(run: subprocess.Popen, target: str, number: signal.Signals) -> bool:
    """Send the signal; False when there is nobody to send it to yet, or no longer."""
    victims, is_sent = processes_of(run)[target], False
    for victim in victims[:1] if target == "worker" else victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.send_signal(number)
            is_sent = True
    return is_sent


def wait_for_end(everyone: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """The processes that are still there after so long."""
    _, alive = psutil.wait_procs(everyone, timeout=seconds)
    return [each for each in alive if is_alive(each)]


def is_done(place: Workplace, name: str) -> bool:
    """Whether a run took its last step; the runner's exit code is 0 also when its launcher was killed."""
    latest = place.run(name) / "checkpoints" / "latest"
    return latest.exists() and latest.read_text() == f"step-{STEPS:06d}"


def newest(place: Workplace, name: str) -> Path | None:
    folders = sorted((place.run(name) / "checkpoints").glob("step-??????"))
    return folders[-1] if folders else None


@pytest.mark.slow
@pytest.mark.ranks
def test_random_faults_lose_nothing_and_hang_nowhere(tmp_path: Path) -> None:
    num_faults = int(os.environ.get("MEGAM3_FAULTS", "2"))
    rng = random.Random(int(os.environ.get("MEGAM3_FAULT_SEED", "0")))
    place = make_workplace(tmp_path)
    for name in ("store", "whole"):
        before = time.monotonic()
        assert start(place, name, tmp_path / "log").wait(300) == 0, (tmp_path / "log").read_text()
    whole_seconds = time.monotonic() - before
    table: Counter[tuple[str, str]] = Counter()
    run, slowest = 0, 0.0
    while sum(table.values()) < num_faults:
        name, log = f"run-{run}", tmp_path / "log"
        before_newest = newest(place, name)
        process = start(place, name, log)
        time.sleep(rng.uniform(0.05, 1.0) * whole_seconds)
        target, kind = rng.choice(TARGETS), rng.choice(list(SIGNALS))
        if target in ("runner", "launcher", "all") and kind == "stop":
            kind = "kill -9"  # a stopped launcher leaves its ranks at work: nothing to recover from
        everyone = processes_of(process)["all"]
        if process.poll() is None and inject(process, target, SIGNALS[kind]):
            struck = time.monotonic()
            left = wait_for_end(everyone, END_SECONDS)
            process.wait(END_SECONDS)
            slowest = max(slowest, time.monotonic() - struck)
            assert not left, f"{target}, {kind}: {left} still run\n{log.read_text()[-4000:]}"
            table[(target, kind)] += 1
            phase = (log.read_text().splitlines() or [""])[-1][:60]
            print(f"{target}, {kind}: ended in {time.monotonic() - struck:.1f} s; {phase}", flush=True)
            if not is_done(place, name) and (folder := newest(place, name)) and rng.random() < 0.3:
                damage = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
                if len(list(folder.parent.glob("step-??????"))) > 1:
                    damage.write_bytes(damage.read_bytes()[:-1])
                    table[("newest checkpoint", "one byte short")] += 1
        else:
            process.wait(300)
        assert before_newest is None or newest(place, name) is not None
        if is_done(place, name):
            assert place.figures(name) == place.figures("whole")
            run += 1
    assert start(place, f"run-{run}", tmp_path / "log").wait(300) == 0, (tmp_path / "log").read_text()
    assert place.figures(f"run-{run}") == place.figures("whole")
    lines = [f"| {target} | {kind} | {count} |" for (target, kind), count in sorted(table.items())]
    print("\n".join([f"slowest end after a fault: {slowest:.1f} s; finished runs: {run + 1}", *lines]))
