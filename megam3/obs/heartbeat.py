"""Where a run stands, for scripts and for people who are not on the node: `heartbeat.json` in the run folder.

    {"time": "2026-11-24T12:00:05+00:00", "host": "gpu07", "pid": 4711, "job": "123", "phase": "forward",
    "step": 1200, "saved_step": 1000, "writing_step": 1200,
     "total_steps": 25000, "tokens_per_second": 181000.0, "seconds_per_step": 3.1, "eta_seconds": 73780.0}

Written aside and renamed every few seconds by a thread of its own, so a reader never sees half of it, and a
file system that hangs stops the heartbeat and not the training. A `time` that is minutes old means that the
main rank does not run.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from megam3.files import write_json

HEARTBEAT_FILE = "heartbeat.json"
SECONDS = 5.0
END_SECONDS = 10.0
"""How long the end of a run waits for a file system that hangs; the last beat is left out then."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run is; times are over the run's own steps, not those of the run it resumed."""

    phase: str = "start"
    step: int = 0
    """Steps done."""
    total_steps: int = 0
    tokens_per_second: float | None = None
    seconds_per_step: float | None = None
    eta_seconds: float | None = None
    saved_step: int | None = None
    """Of the newest checkpoint that a start would continue from; None: there is none."""
    writing_step: int | None = None
    """Of a checkpoint that a thread writes while the phases of the training go on; the phase `save` is the
    time in which training itself stands still for one."""


class Heartbeat:
    """Writes the file while it is entered. Main rank only."""

    def __init__(self, run_dir: str | Path, environ: Mapping[str, str], seconds: float = SECONDS):
        self.path = Path(run_dir) / HEARTBEAT_FILE
        self._who = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "job": environ.get("SLURM_JOB_ID", ""),
        }
        self._seconds = seconds
        self._place = Place()
        self._first: tuple[int, float] | None = None
        self._ended = threading.Event()

    def __enter__(self) -> Heartbeat:
        self._thread = threading.Thread(target=self._keep, name="megam3-heartbeat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        # an older beat still on its way must not land on the last one
        self._thread.join(END_SECONDS)
        if not self._thread.is_alive():
            self._write_once()

    def at(self, step: int, phase: str) -> None:
        """The loop enters a phase after `step` done steps."""
        self._place = replace(self._place, step=step, phase=phase)

    def checkpoint(self, saved_step: int | None, writing_step: int | None) -> None:
        """What is on the disk, and what is on its way there."""
        self._place = replace(self._place, saved_step=saved_step, writing_step=writing_step)

    def progress(self, step: int, total_steps: int, tokens_per_second: float | None = None) -> float | None:
        """`step` is done; speed and remaining time follow from the first call on. Returns seconds a step."""
        now = time.monotonic()
        if self._first is None:
            self._first = (step, now)
        first_step, began = self._first
        per_step = (now - began) / (step - first_step) if step > first_step else None
        self._place = replace(
            self._place,
            step=step,
            total_steps=total_steps,
            tokens_per_second=tokens_per_second or self._place.tokens_per_second,
            seconds_per_step=per_step,
            eta_seconds=None if per_step is None else per_step * (total_steps - step),
        )
        return per_step

    def _keep(self) -> None:
        while not self._ended.is_set():
            self._write_once()
            self._ended.wait(self._seconds)

    def _write_once(self) -> None:
        moment = {"time": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        try:
            write_json(self.path, {**moment, **self._who, **asdict(self._place)}, durable=False)
        except OSError:
            # a full disk must not end a run here; the file's age shows that something is wrong
            return
