"""A rank ends with the program that started it: no orphan trains on in a run folder that somebody else has
taken up.

Only launchers count (deepspeed, torchrun, mpirun …), as far up as they follow each other: a run started from
a shell outlives it, as `nohup` and `disown` expect. `deepspeed` is two processes, a runner and a launcher
below it, and the runner's death leaves the launcher alone: so the whole chain is watched, not only the
parent.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from megam3.obs.lease import process_start

LAUNCHERS = re.compile(
    "deepspeed|torchrun|torch[./]distributed|mpirun|mpiexec|prterun|orterun|orted|prted|hydra|pmi_proxy"
)
POLL_SECONDS = 1.0
EXIT_ORPHAN = 87
"""Exit code of a rank whose launcher has gone."""
GRACE_SECONDS = 300.0
"""For the save after a launcher's death; a rank that is stuck then leaves without."""
PR_SET_PDEATHSIG = 1


_chain: dict[int, int] | None = None
"""Of `remember_launcher`."""


def remember_launcher() -> None:
    """Find the launchers now, and have the kernel end this process with its parent from now on.

    For the first line of a program: a launcher that ends during the seconds of its rank's imports would leave
    an orphan that cannot tell any more that it had one.
    """
    global _chain
    _chain = launcher_chain()
    if _chain:
        _ask_kernel()


def launcher_chain() -> dict[int, int]:
    """Process ids of the launchers above this process, nearest first, with their start times; empty without
    one (or without /proc).
    """
    chain: dict[int, int] = {}
    pid = os.getppid()
    while pid > 1 and LAUNCHERS.search(_command(pid)):
        started = process_start(pid)
        if started is None:
            break
        chain[pid] = started
        pid = _parent(pid)
    return chain


def die_with_launcher(end: Callable[[int], None] | None = None) -> threading.Thread | None:
    """End this process when a launcher above it ends; the thread that watches, or None when there is no
    launcher.

    The parent's death is the kernel's to answer (SIGKILL, Linux). Of a launcher further up nobody can tell
    whether it was killed or asked to end, so its death counts as the SIGTERM that it did not pass on: save at
    the step's end, leave.

    Args:
        end: called with the launcher's process id, in the thread; None: as said above.
    """
    chain = launcher_chain() if _chain is None else _chain
    if not chain:
        return None
    if _chain is None:
        _ask_kernel()
    thread = threading.Thread(target=_watch, args=(chain, end or _leave), name="megam3-launcher", daemon=True)
    thread.start()
    return thread


def _watch(chain: dict[int, int], end: Callable[[int], None]) -> None:
    while True:
        for pid, started in chain.items():
            if process_start(pid) != started:
                end(pid)
                return
        time.sleep(POLL_SECONDS)


def _leave(pid: int) -> None:
    os.write(2, f"megam3: process {os.getpid()}: the launcher (process {pid}) has ended; stopping\n".encode())
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(EXIT_ORPHAN)


def _ask_kernel() -> None:
    """Linux kills this process when its parent ends, even one whose threads cannot run; elsewhere the thread
    alone watches.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(EXIT_ORPHAN)  # it ended before the request


def _command(pid: int) -> str:
    try:
        parts = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    # the program, and what Python runs: a recipe or a folder called "deepspeed" further right is no launcher
    shown: list[str] = []
    after = False
    for part in (p.decode(errors="replace") for p in parts[:6]):
        if after or not shown:
            shown.append(part if after and shown[-1] == "-m" else os.path.basename(part))
        after = part in ("-m", "-u") or (len(shown) == 1 and "python" in part)
    return " ".join(shown)


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0
