"""Faults drawn from a seed, one at a start, until the run is done; after each it is said what must hold.

whole run, undisturbed                               its figures are what every other run must end with
run 0: fault, start again, fault, start again …      until its last step; then figures and evaluations
run 1: …                                             are compared, bit for bit
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from megam3.dist.env import free_port
from tests.faults.draws import Drawn, Ended, Outcome, draw, judge
from tests.faults.inject import Fault, folders_of
from tests.launches import ROOT, Workplace

STEPS = 40
SAVE_EVERY = 5
LIMIT_SECONDS = int(os.environ.get("MEGAM3_FAULT_LIMIT", "15"))
"""train.timeout_seconds of every run. A process that gets no turn for a third of it counts as silent, and
tests share their machine."""
END_SECONDS = 60.0 + 4 * LIMIT_SECONDS
"""Until everything has ended after a fault, on a machine that may be busy."""
TMPFS_MIB = 96


class Forks:
    """The process that forks runs; see `tests.faults.deepspeed_forks`."""

    def __init__(self, folder: Path):
        self._folder, self._count, self._buffer = folder, 0, b""
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.deepspeed_forks"],
            cwd=ROOT,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert "ready" in self._answer(120.0)

    def close(self) -> None:
        """End the server; runs that it started have ended."""
        assert self._server.stdin
        self._server.stdin.close()
        self._server.wait(120)

    def run(self, arguments: Sequence[str], log: Path, fault: Fault | None = None, **request: Any) -> Ended:
        """A run to its end, and to the end of its last process."""
        self._count += 1
        pids = fault.pids if fault else str(self._folder / f"pids-{self._count}")
        log.unlink(missing_ok=True)
        given = {"arguments": list(arguments), "log": str(log), "port": free_port(), "pids": pids, **request}
        given["fault"] = asdict(fault) if fault else None
        assert self._server.stdin
        self._server.stdin.write((json.dumps(given) + "\n").encode())
        self._server.stdin.flush()
        launcher = int(self._answer(120.0)["started"])
        code, left = None, [launcher]
        deadline, struck_at = time.monotonic() + 2 * END_SECONDS, None
        while time.monotonic() < deadline and (code is None or left):
            with contextlib.suppress(TimeoutError):
                code = self._answer(0.05).get("code", code) if code is None else code
            left = _session(launcher)
            if struck_at is None and fault and Path(fault.struck).exists():
                struck_at = time.monotonic()
                deadline = struck_at + END_SECONDS
            time.sleep(0.02)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        text = log.read_text(errors="replace") if log.exists() else ""
        assert not left, f"{left} still run {END_SECONDS} s after {fault}\n{text[-6000:]}"
        assert code is not None
        return Ended(code=code, text=text, seconds=time.monotonic() - struck_at if struck_at else 0.0)

    def _answer(self, seconds: float) -> dict[str, int]:
        end = time.monotonic() + seconds
        assert self._server.stdout
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._server.stdout], [], [], left)[0]:
                raise TimeoutError
            data = os.read(self._server.stdout.fileno(), 4096)
            assert data, "the forking process has ended"
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)


def _session(launcher: int) -> list[int]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == launcher and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of TMPFS_MIB at `folder`; yields whether it could be mounted (root alone may)."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m", "tmpfs", str(folder)]
    is_mounted = os.getuid() == 0 and subprocess.run(command, check=False).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)


class Campaign:
    """Runs under faults in `place`; its runs lie on a small disk where one can be mounted."""

    def __init__(self, place: Workplace, forks: Forks, rng: random.Random, can_mount: bool):
        self._place, self._forks, self._rng, self._can_mount = place, forks, rng, can_mount
        self._folder = place.folder
        self.outcomes: list[Outcome] = []
        self.failures: list[str] = []
        """What did not hold; the campaign goes on with another run."""
        self.num_runs = 0

    def run_whole(self) -> None:
        """The undisturbed run."""
        for name in ("first", "whole"):
            ended = self._forks.run(self._arguments(name), self._folder / "log")
            assert ended.code == 0, ended.text
        shutil.rmtree(self._place.run("first"))

    def run_until(self, num_faults: int) -> None:
        """Run after run, until so many faults have struck."""
        while len(self.outcomes) + len(self.failures) < num_faults:
            name = f"run-{self.num_runs}"
            try:
                self._one_run(name, num_faults)
            except AssertionError as error:
                self.failures.append(str(error))
                print(f"FAILED: {name}: {error}", flush=True)
                self._mend_disk(name)
            shutil.rmtree(self._place.run(name), ignore_errors=True)
            self.num_runs += 1

    def _one_run(self, name: str, num_faults: int) -> None:
        while not self._is_done(name):
            wants_more = len(self.outcomes) < num_faults
            self._start(name, draw(self._rng, self._can_mount) if wants_more else None)
        self._compare(name)

    def _start(self, name: str, drawn: Drawn | None) -> None:
        if drawn is not None and drawn.action == "damage":
            drawn = self._damage(name, drawn)
            if drawn is None:
                return
        arguments = self._arguments(name, drawn)
        if drawn is None or drawn.action == "damage":
            ended = self._forks.run(arguments, self._folder / "log")
            assert ended.code == 0, ended.text[-6000:]
            return
        before = self._newest(name)
        marks = [str(self._folder / f"{what}-{len(self.outcomes)}") for what in ("struck", "pids")]
        for mark in marks:
            Path(mark).unlink(missing_ok=True)
        fault = Fault(
            **asdict(drawn),
            run_dir=str(self._place.run(name)),
            store_dir=arguments[-1].partition("=")[2],
            struck=marks[0],
            pids=marks[1],
        )
        has_full_memory = drawn.action == "shared memory full"
        ended = self._forks.run(arguments, self._folder / "log", fault, full_shm=has_full_memory)
        self._mend_disk(name)
        self._check_start(before, ended.text)
        if Path(fault.struck).exists():
            step = json.loads(Path(fault.struck).read_text())["step"]
            self._record(name, drawn, ended, step)
        else:
            assert ended.code == 0, f"{drawn} did not strike\n{ended.text[-6000:]}"

    def _arguments(self, name: str, drawn: Drawn | None = None) -> list[str]:
        place = self._place
        # a store of its own where preparing is to be disturbed; from then on the run stays with it
        own = place.folder / "stores" / name
        store = own if own.exists() or (drawn and drawn.phase == "store") else place.folder / "store"
        return [
            place.recipe,
            f"name={name}",
            f"train.steps={STEPS}",
            f"train.save_every_steps={SAVE_EVERY}",
            "train.keep_checkpoints=2",
            "train.evaluate_every_steps=10",
            f'evaluation.folders=["{place.folder}/beir"]',
            f"train.timeout_seconds={LIMIT_SECONDS}",
            "data.num_workers=1",
            "engine.template=zero2",
            f"data.store_dir={store}",
        ]

    def _record(self, name: str, drawn: Drawn, ended: Ended, step: int) -> None:
        newest = self._newest(name)
        saved = [int(found) for found in re.findall(r"saved \S+/step-(\d+)", ended.text)]
        assert newest >= max(saved, default=0), f"{drawn}: step {saved[-1]} was saved, {newest} is there"
        message = judge(drawn, ended, self._is_done(name))
        # an asynchronous save may still be under way when the next one is due
        assert step - newest <= 2 * SAVE_EVERY, f"{drawn}: struck at step {step}, {newest} is left"
        outcome = Outcome(
            drawn=drawn,
            step=step,
            code=ended.code,
            end_seconds=ended.seconds,
            resumed_step=newest,
            message=message,
        )
        self.outcomes.append(outcome)
        what = f"{drawn.phase}, {drawn.action}, {drawn.target}"
        print(f"{len(self.outcomes)}. {name}: {what}: step {step}, code {ended.code}, "
              f"{ended.seconds:.1f} s, goes on at {newest}: {message[:150]}", flush=True)  # fmt: skip

    def _check_start(self, before: int, text: str) -> None:
        """The run went on where its newest checkpoint is: nothing lost, nothing else taken."""
        found = re.search(r"starting at step (\d+)", text)
        if found is not None:
            assert int(found.group(1)) == before, f"{before} is the newest\n{text[-4000:]}"

    def _damage(self, name: str, drawn: Drawn) -> Drawn | None:
        """Spoil a file of the newest checkpoint; None while there is no other to go back to."""
        folders = self._checkpoints(name)
        if len(folders) < 2:
            return None
        victim = self._rng.choice(sorted(path for path in folders[-1].rglob("*") if path.is_file()))
        how = self._rng.choice(("one byte short", "one bit flipped", "missing"))
        content = bytearray(victim.read_bytes())
        if how == "missing" or not content:
            victim.unlink()
        elif how == "one byte short":
            victim.write_bytes(content[:-1])
        else:
            content[self._rng.randrange(len(content))] ^= 1 << self._rng.randrange(8)
            victim.write_bytes(content)
        step, expected = int(folders[-1].name[5:]), int(folders[-2].name[5:])
        ended = self._forks.run(self._arguments(name), self._folder / "log")
        assert ended.code == 0, ended.text[-6000:]
        assert f"starting at step {expected}" in ended.text, f"{victim} {how}\n{ended.text[-6000:]}"
        message = next(line for line in ended.text.splitlines() if "trying the one before" in line)
        drawn = Drawn(**{**asdict(drawn), "phase": "between starts", "target": how})
        self.outcomes.append(
            Outcome(drawn=drawn, step=step, code=0, end_seconds=0.0, resumed_step=expected, message=message)
        )
        print(f"{len(self.outcomes)}. {name}: {victim.name} {how}: goes on at {expected}: {message}")
        return None

    def _mend_disk(self, name: str) -> None:
        if self._can_mount:
            (self._place.folder / "runs" / "filler").unlink(missing_ok=True)
            subprocess.run(["chattr", "-i", *folders_of(str(self._place.run(name)))], check=False)

    def _checkpoints(self, name: str) -> list[Path]:
        folders = sorted((self._place.run(name) / "checkpoints").glob("step-??????"))
        return [folder for folder in folders if (folder / "COMPLETE").exists()]

    def _newest(self, name: str) -> int:
        folders = self._checkpoints(name)
        return int(folders[-1].name[5:]) if folders else 0

    def _is_done(self, name: str) -> bool:
        return self._newest(name) == STEPS and len(self._evaluations(name)) == STEPS // 10

    def _evaluations(self, name: str) -> dict[str, dict]:
        found = {}
        for path in sorted((self._place.run(name) / "eval").glob("*.json")):
            found[path.name] = json.loads(path.read_text())
            del found[path.name]["seconds"]
        return found

    def _compare(self, name: str) -> None:
        assert self._place.figures(name) == self._place.figures("whole"), name
        assert [row["step"] for row in self._place.rows(name)] == list(range(1, STEPS + 1))
        assert self._evaluations(name) == self._evaluations("whole")
