"""Starts runs of two ranks by forking, since most of a start is imports: two seconds instead of ten.

    python -m tests.faults.deepspeed_forks        requests on standard input, one JSON line each

A request forks a launcher in a session of its own, which forks the ranks, as DeepSpeed's launcher starts
them: a rank that fails ends the others, and a signal to the launcher is passed on. The module's name holds
"deepspeed" so that a rank takes its parent for a launcher and ends with it. Answers: {"started": pid} and,
whenever a launcher has ended, {"ended": pid, "code": exit code}.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

WORLD_SIZE = 2
CLONE_NEWNS = 0x20000
"""unshare(2): mounts of this process are no longer those of the machine."""
PEER_SECONDS = 5.0
"""For a rank's message about the other one's end; DeepSpeed's launcher ends it sooner."""


def main() -> None:
    """Import everything, say so, and serve requests until standard input ends."""
    import megam3.train  # noqa: F401  what the forks share

    # a thread would not exist in a fork, and a lock that it held would never be released there; starting with
    # JE_ARROW_MALLOC_CONF=background_thread:false keeps the one of pyarrow's allocator away
    assert len(os.listdir("/proc/self/task")) == 1, "threads before the fork"
    _say(ready=os.getpid())
    launchers: set[int] = set()
    buffer = b""
    while True:
        if select.select([0], [], [], 0.05)[0]:
            data = os.read(0, 65536)
            if not data:
                return
            buffer += data
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                launchers.add(_fork_launcher(json.loads(line)))
        for pid in list(launchers):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                launchers.discard(pid)
                _say(ended=pid, code=os.waitstatus_to_exitcode(status))


def _say(**answer: int) -> None:
    os.write(1, (json.dumps(answer) + "\n").encode())


def _fork_launcher(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        _say(started=pid)
        return pid
    code = 70
    try:
        os.setsid()
        _redirect(request["log"])
        if request.get("full_shm"):
            _fill_shared_memory()
        code = _launch(request)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(log: str) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    nothing = os.open("/dev/null", os.O_RDONLY)
    for source, target in ((nothing, 0), (descriptor, 1), (descriptor, 2)):
        os.dup2(source, target)


def _fill_shared_memory() -> None:
    """A /dev/shm of this run's own, with no byte left."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, 0x4000 | 0x40000, None):  # MS_REC|PRIVATE
        raise OSError(ctypes.get_errno(), "unshare")
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64k"):
        raise OSError(ctypes.get_errno(), "mount /dev/shm")
    with open("/dev/shm/filler", "wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            pass


def _launch(request: dict[str, Any]) -> int:
    """Fork the ranks and wait for them; returns the first exit code that is not 0."""
    ranks: dict[int, int] = {}
    for rank in range(WORLD_SIZE):
        pid = os.fork()
        if pid == 0:
            _rank(rank, request)
        ranks[pid] = rank
    # renamed, so that a rank never reads half of it
    partial = Path(request["pids"] + ".partial")
    partial.write_text(
        json.dumps({"launcher": os.getpid(), **{str(rank): pid for pid, rank in ranks.items()}})
    )
    partial.rename(request["pids"])

    def pass_on(number: int, frame: FrameType | None) -> None:
        for pid in ranks:
            os.kill(pid, number)

    signal.signal(signal.SIGTERM, pass_on)
    code, deadline = 0, None
    while ranks:
        ended, status = os.waitpid(-1, os.WNOHANG)
        if ended:
            rank = ranks.pop(ended)
            own = os.waitstatus_to_exitcode(status)
            if own:
                print(f"launcher: rank {rank} ended with code {own}", file=sys.stderr, flush=True)
                code = code or own
                deadline = deadline or time.monotonic() + PEER_SECONDS
        elif deadline and time.monotonic() > deadline:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.02)
    return code


def _rank(rank: int, request: dict[str, Any]) -> None:
    code = 70
    try:
        # `setdefault` in the package must find what a launcher sets
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(WORLD_SIZE),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(request["port"]),
            **request.get("environ", {}),
        )
        from megam3 import train
        from megam3.obs.launcher import remember_launcher
        from tests.faults.inject import Fault, install

        remember_launcher()  # what `python -m megam3.train` does first
        if request.get("fault") and request["fault"]["actor"] == rank:
            install(Fault(**request["fault"]))
        code = train.main(list(request["arguments"]))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
