"""Where a run stands, for a person: a bar on a terminal, plain lines in a file or a pipe.

    step   120/6000 ━━━━ loss 1.734  accuracy 0.6406  12,345 tokens/s  1:02:05 left

That is 80 columns; the parts of the loss follow where the terminal is wider, and always in the log. Every
figure is the mean over the last `log_every_steps` steps, not that of one batch.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

logger = logging.getLogger(__name__)

MAX_BAR_WIDTH = 20
GAP = "  "
"""Between two figures on a line."""


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> format_duration(3725), format_duration(65)
    ('1:02:05', '1:05')
    """
    minutes, rest = divmod(int(round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def headline(values: Mapping[str, float]) -> dict[str, str]:
    """The figures a person looks at first, as {name in `values`: text}: the total loss and one accuracy.

    The accuracy is that of the combined score, else the first there is: pretraining and single heads have no
    sum.

    >>> headline({"loss/total": 1.23456, "loss/dense": 2.0, "accuracy/dense": 0.5, "accuracy/sum": 0.625})
    {'loss/total': 'loss 1.235', 'accuracy/sum': 'accuracy 0.625'}
    """
    losses = [name for name in ("loss/total", "loss") if name in values]
    accuracies = [name for name in values if name.split("/")[0] == "accuracy"]
    accuracies.sort(key=lambda name: name != "accuracy/sum")  # stable: the first of the others stays first
    return {name: f"{name.split('/')[0]} {values[name]:.4g}" for name in (*losses[:1], *accuracies[:1])}


def other_losses(values: Mapping[str, float]) -> list[str]:
    """The parts of the loss, and names without a slash, as `name value`.

    >>> other_losses({"loss/total": 3.0, "loss/dense": 2.0, "lexical/nonzero_share": 0.1})
    ['dense 2']
    """
    shown = headline(values)
    return [
        f"{name.removeprefix('loss/')} {value:.4g}"
        for name, value in values.items()
        if name not in shown and (name.startswith("loss/") or "/" not in name)
    ]


@dataclass(frozen=True)
class _Step:
    """One step of the window."""

    seconds: float
    num_tokens: int
    values: Mapping[str, float]


class TrainingProgress:
    """Progress of a run of `total_steps`, resumed at `start_step`; a context manager. Inactive, it does
    nothing.

    A bar is drawn when stderr is a terminal. Every `log_every_steps` steps, and at the last, one line goes to
    the log in any case; with a bar it goes to the file only, since the bar shows the same.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        log_every_steps: int = 10,
        *,
        active: bool = True,
        console: Console | None = None,
    ):
        self.total_steps, self.start_step, self.log_every_steps = total_steps, start_step, log_every_steps
        self._active = active
        self._console = console or Console(file=sys.stderr)
        self._bar: Progress | None = None
        self._bar_column = BarColumn(bar_width=MAX_BAR_WIDTH)
        self._window: deque[_Step] = deque(maxlen=log_every_steps)
        self._started = self._step_started = time.monotonic()

    def __enter__(self) -> TrainingProgress:
        self._started = self._step_started = time.monotonic()
        if self._active and self._console.is_terminal:
            whole = Column(no_wrap=True)  # a column that may wrap is the first that rich takes width from
            self._bar = Progress(
                TextColumn("step", table_column=whole),
                MofNCompleteColumn(table_column=whole.copy()),
                self._bar_column,
                TextColumn("{task.fields[text]}", table_column=whole.copy()),
                console=self._console,
            )
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

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time within is not charged to tokens/s: evaluation, saving. The time left counts it, since it comes
        again."""
        before = time.monotonic()
        try:
            yield
        finally:
            self._step_started += time.monotonic() - before

    def update(self, step: int, values: Mapping[str, float], num_tokens: int = 0) -> None:
        """Report that `step` (counted from 1) is done.

        `values` are its figures (`loss/total`, `accuracy/sum`, …), `num_tokens` its tokens over all ranks.
        """
        if not self._active:
            return
        now = time.monotonic()
        self._window.append(_Step(now - self._step_started, num_tokens, values))
        self._step_started = now
        is_line_due = step % self.log_every_steps == 0 or step == self.total_steps
        if not is_line_due and self._bar is None:
            return
        means = self._means()
        first = [
            *headline(means).values(),
            *self._speed(),
            f"{format_duration(self.remaining_seconds(step, now))} left",
        ]
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=self._fit(first, other_losses(means)))
        if is_line_due:
            line = GAP.join([*headline(means).values(), *other_losses(means), *first[len(headline(means)) :]])
            logger.info(
                "step %d/%d  %s", step, self.total_steps, line, extra={"file_only": self._bar is not None}
            )

    def remaining_seconds(self, step: int, now: float) -> float:
        """Mean time of the steps of this run (not of the run it resumed) times the steps left."""
        done = max(step - self.start_step, 1)
        return (now - self._started) / done * max(self.total_steps - step, 0)

    def _means(self) -> dict[str, float]:
        names = dict.fromkeys(name for step in self._window for name in step.values)
        found = {name: [step.values[name] for step in self._window if name in step.values] for name in names}
        return {name: sum(values) / len(values) for name, values in found.items()}

    def _speed(self) -> list[str]:
        num_tokens = sum(step.num_tokens for step in self._window)
        seconds = max(sum(step.seconds for step in self._window), 1e-9)
        return [f"{num_tokens / seconds:,.0f} tokens/s"] if num_tokens else []

    def _fit(self, first: Sequence[str], rest: Sequence[str]) -> str:
        """The text behind the bar: all of `first`, and of `rest` what the terminal holds; the bar gets what
        is left."""
        free = self._console.width - len(f"step {self.total_steps}/{self.total_steps} ") - len(" ")
        text = GAP.join(first)
        for piece in rest:
            if len(text) + len(GAP) + len(piece) + MAX_BAR_WIDTH > free:
                break
            text += GAP + piece
        self._bar_column.bar_width = min(MAX_BAR_WIDTH, max(1, free - len(text)))
        return text


@contextlib.contextmanager
def encoding_progress(
    total: int, show: bool, progress: Callable[[int], None] | None
) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of texts just finished; draws a bar on stderr if `show`."""
    with Progress(console=Console(file=sys.stderr), disable=not show) as bar:
        task = bar.add_task("encoding", total=total)

        def report(count: int) -> None:
            bar.advance(task, count)
            if progress is not None:
                progress(count)

        yield report
