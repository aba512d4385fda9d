"""A rank below a launcher ends with it; a rank below a shell does not."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

RANK = """
import time
from megam3.obs.launcher import die_with_launcher
die_with_launcher()
print("ready", flush=True)
time.sleep(600)
"""
# what train.py does first; it never comes to the rest
RANK_THAT_IMPORTS = """
import time
from megam3.obs.launcher import remember_launcher
remember_launcher()
print("ready", flush=True)
time.sleep(600)
"""
# a runner that starts a launcher that starts a rank, as `deepspeed` does
LAUNCHER = "import subprocess, sys\nsys.exit(subprocess.call(sys.argv[1:]))\n"


@pytest.fixture
def tree(tmp_path: Path):
    """Starts runner, launcher and rank under the given program names; returns their processes."""
    started: list[psutil.Process] = []

    def start(name: str, program: str = RANK) -> list[psutil.Process]:
        (tmp_path / "rank.py").write_text(program)
        for part in ("runner", "launch"):
            (tmp_path / f"{name}_{part}.py").write_text(LAUNCHER)
        programs = [str(tmp_path / f"{name}_runner.py"), sys.executable, str(tmp_path / f"{name}_launch.py")]
        top = subprocess.Popen(
            [sys.executable, *programs, sys.executable, str(tmp_path / "rank.py")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert top.stdout
        assert top.stdout.readline() == "ready\n"
        runner = psutil.Process(top.pid)
        launcher = runner.children()[0]
        started.extend([runner, launcher, launcher.children()[0]])
        return started

    yield start
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):  # gone with the one before
            process.kill()


def is_gone(process: psutil.Process, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_ends_when_the_runner_or_the_launcher_is_killed(tree, killed: int) -> None:
    processes = tree("deepspeed")
    os.kill(processes[killed].pid, signal.SIGKILL)
    assert is_gone(processes[2], 60)


def test_a_rank_outlives_a_program_that_is_no_launcher(tree) -> None:
    processes = tree("nightly")
    for process in processes[:2]:
        os.kill(process.pid, signal.SIGKILL)
    assert not is_gone(processes[2], 2.5)


def test_a_launcher_that_ends_while_its_rank_imports_takes_the_rank_along(tree) -> None:
    runner, launcher, rank = tree("deepspeed", RANK_THAT_IMPORTS)
    launcher.kill()
    assert is_gone(rank, 60)
