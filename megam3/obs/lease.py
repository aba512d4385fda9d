"""One run folder, one run: a lease that names its holder, and that a second run cannot take while the first
one lives.

    lease.json   {"host": "gpu07", "pid": 4711, "started": 8812734, "job": "123", "token": "9f…", "beat": 42}

The file is made with O_EXCL, which is atomic on NFS as well. The holder raises `beat` every few seconds.
Whoever finds the file watches it: a holder on the same host is asked of the kernel; one elsewhere lives as
long as `beat` moves, by the watcher's own clock, so clocks that differ or jump do not matter. A holder that
was frozen and comes back finds another token, and must not publish.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megam3.errors import ConfigError
from megam3.files import read_json, write_json

LEASE_FILE = "lease.json"
BEAT_SECONDS = 5.0
STALE_SECONDS = 30.0
"""A lease whose beat did not move for so long is nobody's. Above it lie a file system's caches and a few
missed beats.
"""

SETTLE_SECONDS = 0.5
"""Of two runs that take the same abandoned lease at once, the one whose token is still there after this time
holds it.
"""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a run folder."""

    host: str
    pid: int
    started: int
    """Start time of the process in clock ticks after boot: a process id comes round again, both together do
    not.
    """
    job: str
    """Slurm's job id; empty outside."""
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}" + (f", job {self.job}" if self.job else "")


def describe_self(environ: Mapping[str, str]) -> Holder:
    """This process as a holder, with a new token."""
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        started=process_start(os.getpid()) or 0,
        job=environ.get("SLURM_JOB_ID", ""),
        token=os.urandom(8).hex(),
    )


def process_start(pid: int) -> int | None:
    """Start time of a process of this machine in clock ticks; None when there is no such process (or no
    /proc).
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return None if state in ("Z", "X") else int(fields[18])


class Lease:
    """A held run folder. Main rank only; `beat` keeps it, `check` fences, `release` gives it back."""

    def __init__(self, run_dir: str | Path, holder: Holder):
        self.path = Path(run_dir) / LEASE_FILE
        self.holder = holder
        self._beats = 0
        self._lock = threading.Lock()
        self._ended = threading.Event()

    def keep(self, seconds: float = BEAT_SECONDS) -> None:
        """Beat in a thread until `release`."""
        threading.Thread(target=self._keep, args=(seconds,), name="megam3-lease", daemon=True).start()

    def beat(self) -> None:
        """Say that the holder lives. Does nothing when the lease is another's by now."""
        with self._lock:
            if self._ended.is_set() or self._current() != self.holder.token:
                return
            self._beats += 1
            write_json(self.path, {**asdict(self.holder), "beat": self._beats}, durable=False)

    def check(self) -> None:
        """Refuse to go on in a folder that another run has taken, or whose lease somebody removed.

        Raises:
            ConfigError: names the other run.
        """
        found = read_lease(self.path)
        if found is None or found[0].token != self.holder.token:
            who = str(found[0]) if found else "nobody: lease.json was removed"
            rule = f"this run ({self.holder}) no longer holds it; it belongs to {who}"
            raise ConfigError("run folder", str(self.path.parent), rule, "let one run at a time use it")

    def release(self) -> None:
        """Give the folder back, if it is still ours."""
        with self._lock:
            self._ended.set()
            if self._current() == self.holder.token:
                self.path.unlink(missing_ok=True)

    def _current(self) -> str | None:
        found = read_lease(self.path)
        return found[0].token if found else None

    def _keep(self, seconds: float) -> None:
        while not self._ended.wait(seconds):
            try:
                self.beat()
            except OSError:
                # a full disk, or a file system that is away for a moment; `check` decides later
                continue


def acquire(run_dir: str | Path, holder: Holder, *, stale_seconds: float = STALE_SECONDS) -> Lease:
    """Take the lease of a run folder, waiting up to `stale_seconds` to see whether a holder elsewhere still
    lives.

    Raises:
        ConfigError: another run holds it; names host, process and job.
    """
    lease = Lease(run_dir, holder)
    lease.path.parent.mkdir(parents=True, exist_ok=True)
    if _create(lease):
        return lease
    found = read_lease(lease.path)
    if found is not None and _is_alive(lease.path, found, holder, stale_seconds):
        rule = f"another run uses this folder: {found[0]}"
        remedy = "end that run first, or give this one another name"
        raise ConfigError("run folder", str(run_dir), rule, remedy)
    taken = read_lease(lease.path)
    if taken != found and taken is not None:
        rule = f"another run has just taken it: {taken[0]}"
        raise ConfigError("run folder", str(run_dir), rule, "end one of the two")
    # whoever replaces last holds it; all look again after a moment
    write_json(lease.path, {**asdict(holder), "beat": 0}, durable=False)
    time.sleep(SETTLE_SECONDS)
    lease.check()
    return lease


def _create(lease: Lease) -> bool:
    try:
        descriptor = os.open(lease.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w") as stream:
        json.dump({**asdict(lease.holder), "beat": 0}, stream)
    return True


def read_lease(path: Path) -> tuple[Holder, int] | None:
    """Holder and beat of a lease file; None when it is missing, empty (just being made) or not one."""
    try:
        raw = read_json(path)
        beat = int(raw.pop("beat"))
        return Holder(**raw), beat
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _is_alive(path: Path, found: tuple[Holder, int], own: Holder, stale_seconds: float) -> bool:
    holder, beat = found
    if holder.host == own.host and process_start(own.pid) is not None:
        return process_start(holder.pid) == holder.started
    if own.job and holder.job == own.job:
        return False  # a requeued job: Slurm ended all processes of its first run before it started this one
    end = time.monotonic() + stale_seconds
    while time.monotonic() < end:
        now = read_lease(path)
        if now is None:
            return False
        if now != (holder, beat):
            return True
        time.sleep(min(0.5, stale_seconds / 10))
    return False
