"""Where a run stands, for a person: a bar with losses, tokens/s and remaining time on a terminal; plain lines in a file or a pipe."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

logger = logging.getLogger(__name__)


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> format_duration(3725), format_duration(65)
    ('1:02:05', '1:05')
    """
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_values(values: Mapping[str, float]) -> str:
    """`name value` pairs on one line, four digits that matter each.

    >>> format_values({"loss": 1.23456, "lr": 5e-5})
    'loss 1.235  lr 5e-05'
    """
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


class TrainingProgress:
    """Progress of a run of `total_steps`, resumed at `start_step`. Use as a context manager on the main rank.

    A bar is drawn when stderr is a terminal. Every `log_every_steps` steps, and at the last, one line goes to the log in any case;
    with a bar it goes to the file only, since the bar shows the same.
    """

    def __init__(
        self, total_steps: int, start_step: int = 0, log_every_steps: int = 10, console: Console | None = None
    ):
        self.total_steps, self.start_step, self.log_every_steps = total_steps, start_step, log_every_steps
        self._console = console or Console(file=sys.stderr)
        self._bar: Progress | None = None
        self._started = time.monotonic()
        self._tokens_since_line, self._line_time = 0, self._started

    def __enter__(self) -> TrainingProgress:
        self._started = self._line_time = time.monotonic()
        if self._console.is_terminal:
            columns = (
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, TimeElapsedColumn(), console=self._console)
            self._task = self._bar.add_task(
                "train", total=self.total_steps, completed=self.start_step, text=""
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, step: int, values: Mapping[str, float], num_tokens: int = 0) -> None:
        """Report that `step` (counted from 1) is done: `values` such as the losses, and the tokens of this step over all ranks."""
        self._tokens_since_line += num_tokens
        now = time.monotonic()
        line_due = step % self.log_every_steps == 0 or step == self.total_steps
        if not line_due and self._bar is None:
            return
        seconds = max(now - self._line_time, 1e-9)
        parts = [format_values(values)]
        if self._tokens_since_line:
            parts.append(f"{self._tokens_since_line / seconds:,.0f} tokens/s")
        parts.append(f"{format_duration(self.remaining_seconds(step, now))} left")
        text = "  ".join(part for part in parts if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        if line_due:
            logger.info(
                "step %d/%d  %s", step, self.total_steps, text, extra={"file_only": self._bar is not None}
            )
            self._tokens_since_line, self._line_time = 0, now

    def remaining_seconds(self, step: int, now: float) -> float:
        """Mean time of the steps of this run (not of the run it resumed) times the steps left."""
        done = max(step - self.start_step, 1)
        return (now - self._started) / done * max(self.total_steps - step, 0)
