"""No silent hang: every rank tells the others where it is, and a run that stands still ends with a message
that says who and where.

    rank 0  step 12  update   for 31 s      waits in a collective
    rank 1  step 12  forward  silent        SIGSTOP, a dead host, a driver that does not return
    -> megam3: no progress for 30 s: rank 1 on gpu08 (process 4711) is silent since step 12, forward

The loop calls `at(step, phase)` whenever it enters a phase. A thread of each rank writes that to the store
through which the ranks met, and looks at the others' only once its own rank stands still: a healthy run of W
ranks costs W small messages every few seconds. The thread runs while the main thread waits inside NCCL or
gloo, since these release the interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
import glob
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

EXIT_STALLED = 86
"""Exit code of a run that stood still; slurm/train.sh starts it again inside the allocation."""

PHASES = ("start", "data", "forward", "update", "log", "save", "evaluate")
"""In the order of a step; of ranks in one step, the one in the earliest phase is the one the others wait for.
"""

UNLIMITED = frozenset({"start", "evaluate"})
"""Phases that may take longer than the limit on every rank together; a silent rank ends them all the same."""

STORE_SECONDS = 2.0
"""How long the store may take to answer before rank 0, which serves it, counts as silent."""


class Store(Protocol):
    """What is used of torch.distributed's stores."""

    def set(self, key: str, value: str) -> None:
        """Write one value."""
        ...

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        ...

    def get(self, key: str) -> bytes:
        """Read one value; waits for it."""
        ...


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """Where one rank is."""

    rank: int
    host: str
    pid: int
    step: int
    """Steps done."""
    phase: str
    beat: int
    """Counts the reports; one that does not grow comes from a process that does not run."""

    def position(self) -> tuple[int, int]:
        """Sorts ranks by how far they are."""
        return self.step, PHASES.index(self.phase)

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} (process {self.pid})"


def open_store() -> Store | None:
    """A connection of its own to the store of the process group; None without a group."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store: Any = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=STORE_SECONDS))
    return dist.PrefixStore("megam3-health", store)


@dataclass(frozen=True, kw_only=True)
class _Heard:
    """What the other ranks said while this one stands still."""

    ranks: Mapping[int, tuple[RankStatus, float]]
    """The last report of each, and when it was first seen."""
    since: float
    """When the watching began."""
    at: float
    """When the store last answered."""


class Watchdog:
    """Ends this process when the run stands still for `limit_seconds`. Use as a context manager around
    training.

    Args:
        rank, world_size: of this process.
        limit_seconds: without a new phase; half of it is spent watching the others.
        store: where the ranks tell each other; None: a world of one.
        end: called with the message; None: write it with all stacks to standard error and exit with
            EXIT_STALLED.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        limit_seconds: float,
        store: Store | None = None,
        end: Callable[[str], None] | None = None,
    ):
        self._rank, self._world_size, self._limit, self._store = rank, world_size, limit_seconds, store
        self._end = end or _leave
        self._poll = min(5.0, limit_seconds / 10)
        # each is replaced whole, so that a thread never reads half of a change made by another
        self._entered = (0, "start", time.monotonic())
        """Steps done, phase, and since when."""
        self._heard = _Heard(ranks={}, since=time.monotonic(), at=time.monotonic())
        self._beat = 0
        self._ended = threading.Event()

    def __enter__(self) -> Watchdog:
        # two threads: a call to the store of a frozen rank 0 never returns, whatever its timeout says
        for target in (self._report, self._watch):
            threading.Thread(target=target, name=f"megam3{target.__name__}", daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()

    def at(self, step: int, phase: str) -> None:
        """The loop enters a phase of the step after `step` done ones."""
        assert phase in PHASES, phase
        self._entered = (step, phase, time.monotonic())

    def status(self) -> RankStatus:
        """Of this rank, for the others."""
        self._beat += 1
        step, phase, _ = self._entered
        return RankStatus(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=step,
            phase=phase,
            beat=self._beat,
        )

    def _report(self) -> None:
        # once at the start, so that a rank which stalls within the first seconds is known by name
        is_over = False
        while not is_over:
            own = self.status()
            # no answer in time, or no connection: the age of `_heard` shows it
            with contextlib.suppress(RuntimeError):
                if self._store is not None:
                    self._store.set(str(self._rank), json.dumps(asdict(own)))
                now = time.monotonic()
                if now - self._entered[2] < self._limit / 2:
                    self._heard = _Heard(ranks={}, since=now, at=now)
                else:
                    self._heard = replace(self._heard, ranks=self._look(now), at=now)
            is_over = self._ended.wait(self._poll)

    def _look(self, now: float) -> dict[int, tuple[RankStatus, float]]:
        """Every other rank's last report, and when it was first seen."""
        ranks = dict(self._heard.ranks)
        for rank in range(self._world_size):
            if self._store is None or rank == self._rank or not self._store.check([str(rank)]):
                continue
            status = RankStatus(**json.loads(self._store.get(str(rank))))
            if rank not in ranks or ranks[rank][0].beat != status.beat:
                ranks[rank] = (status, now)
        return ranks

    def _watch(self) -> None:
        patience = max(3 * self._poll, self._limit / 4)
        while not self._ended.wait(self._poll):
            # the clock first: what is read after it can only be newer, and nobody seems older than he is
            now = time.monotonic()
            entered, heard = self._entered, self._heard
            step, phase, since = entered
            if now - since < self._limit:
                continue
            is_deaf = now - heard.at > max(STORE_SECONDS, patience)
            if not is_deaf and now - heard.since <= patience:
                continue  # the others were not watched long enough to say anything of them
            silent = None if is_deaf else self._silent(heard, now - patience)
            is_over = phase not in UNLIMITED or silent is None or bool(silent)
            if is_over and self._entered is entered:
                own = replace(self.status(), step=step, phase=phase)
                seen = {self._rank: own} | {rank: status for rank, (status, _) in heard.ranks.items()}
                self._end(explain(own, now - since, seen, silent))
                return

    def _silent(self, heard: _Heard, limit: float) -> list[int]:
        """The other ranks that never reported, or said nothing new since `limit`."""
        others = (rank for rank in range(self._world_size) if rank != self._rank)
        return [rank for rank in others if rank not in heard.ranks or heard.ranks[rank][1] < limit]


def explain(own: RankStatus, seconds: float, seen: Mapping[int, RankStatus], silent: list[int] | None) -> str:
    """Why a run stands still, in words.

    Args:
        own: the rank that speaks.
        seconds: since it entered its phase.
        seen: the last report of each rank that ever reported.
        silent: ranks whose reports stopped; None: the store itself, which rank 0 serves, does not answer.
    """
    head = f"megam3: rank {own.rank}: no progress for {seconds:.0f} s in step {own.step + 1}, {own.phase}"
    if silent is None:
        return f"{head}: rank 0, which serves the ranks' meeting point, does not answer"
    if silent:
        return f"{head}: {_list([_last_words(rank, seen.get(rank)) for rank in sorted(silent)])}"
    first = min(seen.values(), key=RankStatus.position).position()
    behind = [status for status in seen.values() if status.position() == first]
    if len(behind) == len(seen):
        where = "this process stands" if len(seen) == 1 else f"all {len(seen)} ranks stand"
        return f"{head}: {where} there and can still speak; the stacks below show where"
    return f"{head}: waiting for {_list([f'{s} in step {s.step + 1}, {s.phase}' for s in behind])}"


def _last_words(rank: int, status: RankStatus | None) -> str:
    if status is None:
        return f"rank {rank} never reported"
    return f"{status} is silent since step {status.step + 1}, {status.phase}"


def _list(parts: list[str], limit: int = 8) -> str:
    more = f"; and {len(parts) - limit} more" if len(parts) > limit else ""
    return "; ".join(parts[:limit]) + more


def _leave(message: str) -> None:
    os.write(2, f"{message}\n".encode())
    faulthandler.dump_traceback(file=2, all_threads=True)
    end_children()
    os._exit(EXIT_STALLED)


def end_children() -> None:
    """Kill the processes this one started (Linux): a data worker that is stopped does not notice that its
    parent has gone."""
    for path in glob.glob("/proc/self/task/*/children"):
        with contextlib.suppress(OSError), open(path) as stream:
            for pid in stream.read().split():
                os.kill(int(pid), signal.SIGKILL)
