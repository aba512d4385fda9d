"""What stands around a run from its first moment to its last: the lease on its folder, the heartbeat, the
watchdog, the launcher.

    with RunGuard(run_dir, timeout_seconds, os.environ) as guard:     from here on nothing hangs in silence
        guard.take_folder()                                           refuses one that another run holds
        guard.at(step, "forward")                                     the loop says where it is
        guard.progress(step, total_steps, tokens_per_second)          and what it has done
        guard.fence()                                                 before anything is published
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping

from megam3.dist import comm
from megam3.errors import ConfigError, shown_path
from megam3.obs.health import Watchdog, open_store
from megam3.obs.heartbeat import Heartbeat
from megam3.obs.launcher import die_with_launcher
from megam3.obs.lease import Lease, acquire, describe_self

logger = logging.getLogger(__name__)

WARNING_SHARE = 0.5
"""A step may take this share of the time between the scheduler's warning and its kill: a save has to fit as
well.
"""

LONG_STEP = (
    "a step takes %.0f s, and the scheduler warns %.0f s before it kills: a save at the step's end may come"
    " too late; warn earlier (#SBATCH --signal) or save more often (train.save_every_minutes)"
)


class RunGuard:
    """Enter on every rank together, after `comm.start`; leave in any order."""

    def __init__(self, run_dir: str, timeout_seconds: float, environ: Mapping[str, str]):
        self._run_dir, self._timeout, self._environ = run_dir, timeout_seconds, environ
        self._stack = contextlib.ExitStack()
        self._lease: Lease | None = None
        self._heartbeat: Heartbeat | None = None
        self._watchdog = Watchdog(comm.rank(), comm.world_size(), timeout_seconds, open_store())
        self._warning_seconds = float(environ.get("MEGAM3_WARNING_SECONDS") or 0.0)

    def __enter__(self) -> RunGuard:
        # the watchdog first: a rank may be frozen at any of the collective calls of a start
        die_with_launcher()
        self._stack.enter_context(self._watchdog)
        return self

    def take_folder(self) -> None:
        """Hold the run folder from here to the end; collective.

        Raises:
            ConfigError: on every rank, when another run holds the folder; names host, process and job.
        """
        failure = None
        if comm.is_main():
            try:
                self._lease = acquire(self._run_dir, describe_self(self._environ))
            except ConfigError as error:
                failure = [error.what, str(error.value), error.rule, error.remedy]
            except OSError as error:
                rule = f"cannot be written ({error.strerror})"
                remedy = "name a folder that this account may write"
                failure = ["run folder", shown_path(self._run_dir), rule, remedy]
        failure = comm.gather_objects_json(failure)[0]
        if failure is not None:
            raise ConfigError(*failure)
        if self._lease is not None:
            self._lease.keep()
            self._stack.callback(self._lease.release)
            self._heartbeat = self._stack.enter_context(Heartbeat(self._run_dir, self._environ))

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def at(self, step: int, phase: str) -> None:
        """The run enters a phase (of `megam3.obs.health.PHASES`) with `step` steps done."""
        self._watchdog.at(step, phase)
        if self._heartbeat is not None:
            self._heartbeat.at(step, phase)

    def progress(self, step: int, total_steps: int, tokens_per_second: float | None = None) -> None:
        """`step` is done. Says once when steps are too long for the scheduler's warning
        (MEGAM3_WARNING_SECONDS).
        """
        if self._heartbeat is None:
            return
        seconds = self._heartbeat.progress(step, total_steps, tokens_per_second)
        if seconds is not None and 0 < self._warning_seconds * WARNING_SHARE < seconds:
            logger.warning(LONG_STEP, seconds, self._warning_seconds)
            self._warning_seconds = 0.0

    def checkpoint(self, saved_step: int | None, writing_step: int | None) -> None:
        """Newest checkpoint that has a name, and the one that is being written beside the training."""
        if self._heartbeat is not None:
            self._heartbeat.checkpoint(saved_step, writing_step)

    def fence(self) -> None:
        """Refuse to publish into a folder that another run has taken meanwhile; the main rank's to call.

        Raises:
            ConfigError: names the other run.
        """
        if self._lease is not None:
            self._lease.check()
