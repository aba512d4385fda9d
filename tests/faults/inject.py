"""Faults inside a rank, at a named place of a run.

    install(Fault(actor=1, phase="rename", occurrence=2, action="kill", target="all", ...))

Places are found from outside, so that no line of the package knows of them: what the loop tells its guard
(data, forward, update, log, save, evaluate), the copies that a checkpoint is written from (snapshot), and the
file operations that Python reports to audit hooks (store, write, rename, retention). "start" is a moment
before the first step.
"""

from __future__ import annotations

import datetime
import glob
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

LOOP_PHASES = ("data", "forward", "update", "log", "save", "evaluate")
FILE_PHASES = ("store", "write", "rename", "retention")
PHASES = ("start", "snapshot", *FILE_PHASES, *LOOP_PHASES)
CLOCK_JUMP_SECONDS = 5 * 86_400.0
SLOW_SECONDS = 0.25
SLOW_TIMES = 12


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong, where, when and to whom."""

    actor: int
    """Rank whose place in the run decides when."""
    phase: str
    """One of PHASES."""
    occurrence: int
    """How often the place is passed before, from 0."""
    delay_seconds: float
    """For "start": this long after the rank began."""
    action: str
    """kill, stop, slow, clock back, clock on, disk full, read-only."""
    target: str
    """this rank, other rank, worker, launcher, all; for kill and stop."""
    run_dir: str
    store_dir: str
    struck: str
    """File that says that and where it happened."""
    pids: str
    """File with the process ids of launcher and ranks."""


def install(fault: Fault) -> None:
    """Arm this process, a rank, with one fault."""
    from megam3.checkpoint import writer
    from megam3.obs.guard import RunGuard

    trigger = _Trigger(fault)
    copy = writer.snapshot

    def snapshot(value: Any, buffers: writer.HostBuffers) -> Any:
        trigger.reached("snapshot")
        return copy(value, buffers)

    writer.snapshot = snapshot
    original = RunGuard.at

    def at(guard: RunGuard, step: int, phase: str) -> None:
        original(guard, step, phase)
        trigger.step = step
        trigger.reached(phase)

    RunGuard.at = at  # type: ignore[method-assign]
    if fault.phase in FILE_PHASES:
        sys.addaudithook(trigger.audit)
    if fault.phase == "start":
        timer = threading.Timer(fault.delay_seconds, trigger.reached, ["start"])
        timer.daemon = True
        timer.start()


class _Trigger:
    """Counts how often a place is passed, and strikes once."""

    def __init__(self, fault: Fault):
        self.step = 0
        self._fault, self._left, self._is_inside = fault, fault.occurrence, False
        self._slow_left, self._is_removing = 0, False
        checkpoints = re.escape(os.path.join(fault.run_dir, "checkpoints"))
        self._in_checkpoints = re.compile(rf"{checkpoints}/.+")
        self._published = re.compile(rf"{checkpoints}/step-\d+$")

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """The hook: sees every file operation of the process, so it is quick about the others."""
        if self._is_inside or event not in ("open", "os.rename", "shutil.rmtree", "os.remove", "os.rmdir"):
            return
        phase = self._phase_of(event, arguments)
        if phase is not None:
            self.reached(phase)

    def _phase_of(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        path = arguments[1 if event == "os.rename" else 0]
        path = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
        if event == "open":
            is_writing = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            self._is_removing = self._is_removing and not is_writing
            if path.startswith(self._fault.store_dir) and is_writing:
                return "store"
            # torch writes its files unseen; opening them again to flush and to sum up is seen
            return (
                "write" if self._in_checkpoints.match(path) and (is_writing or ".partial" in path) else None
            )
        if event == "os.rename":
            return "rename" if self._published.match(path) else None
        if event == "shutil.rmtree":
            self._is_removing = bool(self._in_checkpoints.match(path))
        # inside, names are relative to an open folder
        return "retention" if self._is_removing else None

    def reached(self, phase: str) -> None:
        """The run passes `phase`."""
        if self._slow_left > 0 and phase in LOOP_PHASES:
            self._slow_left -= 1
            time.sleep(SLOW_SECONDS)
        if phase != self._fault.phase or self._left < 0:
            return
        self._left -= 1
        if self._left < 0:
            self._is_inside = True
            try:
                self._strike()
            finally:
                self._is_inside = False

    def _strike(self) -> None:
        fault = self._fault
        Path(fault.struck).write_text(json.dumps({**asdict(fault), "step": self.step}))
        if fault.action in ("kill", "stop"):
            _signal(fault)
        elif fault.action == "slow":
            self._slow_left = SLOW_TIMES
        elif fault.action.startswith("clock"):
            _move_clock(CLOCK_JUMP_SECONDS if fault.action == "clock on" else -CLOCK_JUMP_SECONDS)
        elif fault.action == "disk full":
            _fill(Path(fault.run_dir).parent)
        elif fault.action == "read-only":
            # root may write where permissions forbid it, and a file system with open files stays writable
            subprocess.run(["chattr", "+i", *folders_of(fault.run_dir)], check=True)


def folders_of(run_dir: str) -> list[str]:
    """Folders of a run in which nothing new can be made when they are immutable."""
    return [path for path in (run_dir, os.path.join(run_dir, "checkpoints")) if os.path.isdir(path)]


def _signal(fault: Fault) -> None:
    number = signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP
    while not Path(fault.pids).exists():
        time.sleep(0.01)
    pids = json.loads(Path(fault.pids).read_text())
    workers = [int(pid) for path in glob.glob("/proc/self/task/*/children") for pid in _read(path).split()]
    victims = {
        "this rank": [os.getpid()],
        "other rank": [pids[str(1 - fault.actor)]],
        "worker": workers,
        "launcher": [pids["launcher"]],
        # itself last: nobody else could finish
        "all": [*workers, pids[str(1 - fault.actor)], pids["launcher"], os.getpid()],
    }[fault.target]
    for pid in victims:
        os.kill(pid, number)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _move_clock(seconds: float) -> None:
    """What `date -s` does to a process, without doing it to the machine."""
    now, now_ns, real = time.time, time.time_ns, datetime.datetime

    class Jumped(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:  # type: ignore[override]
            return real.now(tz) + datetime.timedelta(seconds=seconds)

    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("megam3") and getattr(module, "datetime", None) is real:
            module.datetime = Jumped  # type: ignore[attr-defined]


def _fill(folder: Path) -> None:
    with (folder / "filler").open("wb", buffering=0) as stream:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    stream.write(bytes(size))
            except OSError:
                continue
