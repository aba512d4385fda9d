"""Signals that end a run: remembered from the first moment, read by the loop, obeyed at once when they are
repeated.

    SIGUSR1           the time limit or a pre-emption is near: save, leave with EXIT_REQUEUE, be started again
    SIGTERM           somebody cancels: save, leave with EXIT_STOPPED, stay away
    SIGINT            Ctrl-C: as SIGTERM
    SIGTERM again     leave now, without saving (also while the main thread is stuck in a collective)
    SIGUSR2           write the stacks of all threads to standard error and go on

Imports the standard library only: train.py installs it before torch is imported, which takes seconds in which
a signal would kill.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from types import FrameType

EXIT_REQUEUE = 85
"""Exit code of a run that saved itself on SIGUSR1 and wants to be started again; slurm/train.sh turns it into
a requeue.
"""

EXIT_STOPPED = 143
"""Exit code of a run that saved itself on SIGTERM (128 + 15, as a shell says it); nobody starts it again."""

REPEAT_SECONDS = 3.0
"""A second SIGTERM counts from here on: launchers and process groups deliver one and the same request twice
at once, and a launcher that got a Ctrl-C sends its ranks SIGTERM.
"""

REPEAT_INTERRUPT_SECONDS = 0.3
"""A second Ctrl-C counts from here on: a person presses it, and no launcher passes it on as such."""

INTERRUPTED = (
    b"megam3: Ctrl-C: saving after the step in progress; Ctrl-C again leaves at once, without saving\n"
)

LEAVING = b"leaving without saving\n"


class StopSignal:
    """What was asked of this process. Use as a context manager, around everything; the old handlers come back
    on exit.
    """

    def __init__(self) -> None:
        self.wants_requeue = False
        """SIGUSR1 came."""
        self.wants_stop = False
        """SIGTERM or SIGINT came; it outweighs SIGUSR1."""
        self._before: dict[signal.Signals, object] = {}
        self._pipe = (-1, -1)
        self._wakeup_before = -1

    @property
    def requested(self) -> bool:
        """Whether to end after this step, for either reason."""
        return self.wants_requeue or self.wants_stop

    def __enter__(self) -> StopSignal:
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        # written by the C handler, so that the thread below learns of a signal that Python's main thread
        # cannot take
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._remember)
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        threading.Thread(
            target=self._watch, args=(self._pipe[0],), name="megam3-signals", daemon=True
        ).start()
        return self

    def __exit__(self, *exc: object) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        faulthandler.unregister(signal.SIGUSR2)
        os.close(self._pipe[1])  # ends the thread, which closes its own end

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self.wants_stop = True
        else:
            self.wants_requeue = True

    def _watch(self, descriptor: int) -> None:
        first: float | None = None
        while data := os.read(descriptor, 1):
            if data[0] not in (signal.SIGTERM, signal.SIGINT):
                continue
            is_interrupt = data[0] == signal.SIGINT
            now = time.monotonic()
            if first is None:
                first = now
                # one rank speaks: a terminal's Ctrl-C reaches all of them
                if is_interrupt and os.environ.get("RANK", "0") == "0":
                    os.write(2, INTERRUPTED)
            elif now - first >= (REPEAT_INTERRUPT_SECONDS if is_interrupt else REPEAT_SECONDS):
                os.write(2, f"megam3: second {'Ctrl-C' if is_interrupt else 'SIGTERM'}, ".encode() + LEAVING)
                os._exit(EXIT_STOPPED)
        os.close(descriptor)
