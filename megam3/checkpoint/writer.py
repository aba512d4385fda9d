"""Checkpoints of a run in training: a copy in host memory, written by a thread while the steps go on.

    training thread   |step|copy|step|step|step|commit|step|
    writer thread             |write, flush, checksum|

The copy is the whole stall: what follows needs no tensor of the engine. The thread makes no collective call,
since those of the next steps run meanwhile and all ranks must make theirs in one order; it ends with its
files on the disk. The step's own collective then tells every rank when the last thread is done, and at the
end of that step the main rank seals, names and prunes. One copy is held at a time: a save that comes earlier
waits.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from megam3.checkpoint.find import list_steps
from megam3.checkpoint.host_memory import available_bytes
from megam3.checkpoint.save import OwnFiles, Retention, Target, begin, commit, failed, settle, write_error
from megam3.checkpoint.snapshot import MEMORY_MARGIN, HostBuffers, snapshot, storages_of
from megam3.checkpoint.state import RunState
from megam3.dist import comm
from megam3.engine.deepspeed import FileWriter

logger = logging.getLogger(__name__)

Job = tuple[Callable[[Any, str], Any], Any, str]
"""(writer, contents, path) of a file that the thread writes."""


class CheckpointWriter:
    """Writes the checkpoints of one run; every method but `is_writing` is collective.

    Args:
        run_dir: on a file system that all ranks share.
        write: fills a folder and returns this rank's files, as `Engine.save` does.
        model_files: copied into each checkpoint by the main rank.
        retention: asked before and after each checkpoint, because an evaluation may name another best one
            while it is written.
        fence: see `save_checkpoint`.
        in_background: False writes every checkpoint while the training waits.
    """

    def __init__(
        self,
        run_dir: str,
        write: Callable[[str, FileWriter | None], Sequence[str]],
        model_files: str,
        retention: Callable[[], Retention],
        *,
        fence: Callable[[], None] | None = None,
        in_background: bool = True,
    ):
        self._run_dir, self._write, self._model_files = run_dir, write, model_files
        self._retention, self._fence, self._in_background = retention, fence, in_background
        self._buffers = HostBuffers()
        hosts = comm.gather_objects_json(socket.gethostname())
        self._ranks_on_host = hosts.count(socket.gethostname())
        self._pending: _Pending | None = None

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint has been begun that has no name yet; the same on every rank."""
        return self._pending is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's part of it is still on its way to the disk."""
        return self._pending is not None and self._pending.thread.is_alive()

    def has_nothing(self) -> bool:
        """Whether the run has no checkpoint yet that it could go back to; the main rank's view."""
        return comm.any_rank(comm.is_main() and not list_steps(self._run_dir))

    def save(self, state: RunState, *, wait: bool = False) -> None:
        """Begin a checkpoint of `state`, and with `wait` finish it. An earlier one is finished first.

        Raises:
            CheckpointError: see `save_checkpoint`; of an earlier checkpoint as well.
        """
        self.finish()
        began, retention = time.monotonic(), self._retention()
        target = begin(self._run_dir, state, self._model_files, retention)
        jobs: list[Job] | None = [] if self._in_background and not wait else None
        try:
            written = self._write(target.partial, None if jobs is None else self._put_off(jobs))
        except (OSError, RuntimeError) as error:
            # peers may sit in a collective of the engine's: no talk with them here
            raise write_error(target.partial, error) from error
        self._pending = _Pending(
            target, written, jobs or [], began_seconds=began, read_back=retention.keep == 1
        )
        self._pending.thread.start()
        if jobs is None:
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint in flight, if any, is on the disk of every rank, and name it.

        Raises:
            CheckpointError: on every rank, when one of them could not write.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        waited = time.monotonic()
        pending.thread.join()
        self._buffers.release()
        num_bytes = commit(pending.target, pending.own, self._retention(), self._fence)
        now = time.monotonic()
        logger.info(
            "saved %s: %.1f MiB in %.1f s, of which training waited %.2f s",
            pending.target.final,
            num_bytes / 2**20,
            now - pending.began_seconds,
            now - waited + pending.stalled_seconds,
        )

    def _put_off(self, jobs: list[Job]) -> FileWriter:
        """Copies each file's contents for the thread; what the host has no room for is written at once."""

        def hold(contents: Any, path: str, save: Callable[[Any, str], Any]) -> None:
            needed = int(self._buffers.missing_bytes(storages_of(contents)) * MEMORY_MARGIN)
            room = available_bytes() // self._ranks_on_host
            if needed > room:
                logger.warning(
                    "no host memory for a copy of %s (%d MiB, and %d MiB a rank are free): it is written "
                    "while training waits; train.checkpoint_writing=plain does so always",
                    os.path.basename(path),
                    needed >> 20,
                    room >> 20,
                )
                save(contents, path)
            else:
                jobs.append((save, snapshot(contents, self._buffers), path))

        return hold


class SaveClock:
    """When the last checkpoint was written, by this rank's clock; the ranks agree by `Wishes`."""

    def __init__(self, every_minutes: float | None, step: int):
        self.step = step
        """Of the newest checkpoint."""
        self._every_seconds = every_minutes and every_minutes * 60.0
        self._since = time.monotonic()

    def is_due(self) -> bool:
        """Whether the newest checkpoint is older than the recipe wants; the main rank's clock decides."""
        is_old = self._every_seconds is not None and time.monotonic() - self._since >= self._every_seconds
        return is_old and comm.is_main()

    def done(self, step: int) -> None:
        """A checkpoint of `step` was written."""
        self.step, self._since = step, time.monotonic()


class _Pending:
    """A checkpoint whose files are being written by a thread of this rank."""

    def __init__(
        self,
        target: Target,
        written: Sequence[str],
        jobs: list[Job],
        *,
        began_seconds: float,
        read_back: bool,
    ):
        self.target, self.own, self.began_seconds = target, OwnFiles(), began_seconds
        self.stalled_seconds = time.monotonic() - began_seconds
        self._written, self._jobs, self._read_back = written, jobs, read_back
        # a daemon: a run that ends by an error leaves a folder without a name, which the next start clears
        self.thread = threading.Thread(target=self._run, name="megam3-checkpoint", daemon=True)

    def _run(self) -> None:
        try:
            while self._jobs:
                save, contents, path = self._jobs.pop()
                save(contents, path)
                del contents  # ordinary memory of a CPU run goes back file by file
            self.own = settle(self.target.partial, self._written, read_back=self._read_back)
        except Exception as error:  # whatever it is, all ranks raise it at the end of a step
            self.own = failed(self.target.partial, error)
