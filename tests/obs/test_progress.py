"""What a person sees of a run: on terminals of several widths, in a file, and off the main rank."""

import io
import logging
import re
import time
import types

import pytest
from rich.console import Console

from megam3.obs import progress as progress_module
from megam3.obs.progress import TrainingProgress, format_duration

FIGURES = {
    "loss/total": 4.0,
    "loss/dense": 1.25,
    "loss/lexical": 2.25,
    "loss/multi_vector": 3.25,
    "loss/sum": 4.25,
    "accuracy/dense": 0.125,
    "accuracy/sum": 0.625,
    "lexical/nonzero_share": 0.5,
}


@pytest.fixture(autouse=True)
def terminal(monkeypatch):
    """What kind of terminal there is, a test says itself; the variables of the one it is run from would
    outvote it."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved by hand."""
    now = [100.0]
    monkeypatch.setattr(progress_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))

    def advance(seconds):
        now[0] += seconds

    return advance


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3725, "1:02:05")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def run(console, caplog, **options):
    with caplog.at_level(logging.INFO, logger="megam3"):
        with TrainingProgress(7, start_step=2, log_every_steps=3, console=console, **options) as progress:
            for step in range(3, 8):
                progress.update(step, {"loss": 1.0 / step, "dense": 0.5}, num_tokens=100)
    return caplog.records


def test_without_a_terminal_one_line_per_interval_and_one_at_the_end(caplog):
    out = io.StringIO()
    records = run(Console(file=out), caplog)
    messages = [record.getMessage() for record in records]
    assert [message.split("  ")[0] for message in messages] == ["step 3/7", "step 6/7", "step 7/7"]
    assert "loss 0.3333  dense 0.5" in messages[0]
    assert all("tokens/s" in message and message.endswith("left") for message in messages)
    assert messages[-1].endswith("0:00 left")
    assert out.getvalue() == ""
    assert not any(record.file_only for record in records)


def test_figures_are_means_over_the_last_steps_of_an_interval(caplog):
    messages = [record.getMessage() for record in run(Console(file=io.StringIO()), caplog)]
    assert f"loss {(1 / 4 + 1 / 5 + 1 / 6) / 3:.4g}  " in messages[1]
    assert f"loss {(1 / 5 + 1 / 6 + 1 / 7) / 3:.4g}  " in messages[2]


def test_a_line_in_the_log_has_every_part_of_the_loss(caplog, clock):
    with caplog.at_level(logging.INFO, logger="megam3"):
        with TrainingProgress(10, log_every_steps=1, console=Console(file=io.StringIO())) as progress:
            clock(2.0)
            progress.update(1, FIGURES, num_tokens=5000)
    assert caplog.messages == [
        "step 1/10  loss 4  accuracy 0.625  dense 1.25  lexical 2.25  multi_vector 3.25  sum 4.25"
        "  2,500 tokens/s  0:18 left"
    ]


def bar_at(width, clock, steps=6000):
    """What a terminal of `width` columns shows after ten steps of two seconds and 20 000 tokens."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    with TrainingProgress(steps, log_every_steps=10, console=console) as progress:
        for step in range(1, 11):
            clock(2.0)
            progress.update(step, FIGURES, num_tokens=20_000)
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue().split("\r")[-1])
    return last.strip()


def test_80_columns_show_step_loss_accuracy_speed_and_time_left(clock):
    line = bar_at(80, clock)
    assert len(line) <= 80
    assert "\n" not in line
    assert line.startswith("step   10/6000 ")
    assert line.endswith("loss 4  accuracy 0.625  10,000 tokens/s  3:19:40 left")
    assert "━" in bar_at(80, clock, steps=20)


def test_a_long_run_still_fits_80_columns(clock):
    line = bar_at(80, clock, steps=250_000)
    assert len(line) <= 80
    assert line.startswith("step     10/250000 ")
    assert line.endswith("loss 4  accuracy 0.625  10,000 tokens/s  138:53:00 left")


def test_wider_terminals_show_the_parts_of_the_loss_as_far_as_they_fit(clock):
    assert bar_at(110, clock).endswith("3:19:40 left  dense 1.25")
    assert bar_at(220, clock).endswith("left  dense 1.25  lexical 2.25  multi_vector 3.25  sum 4.25")


def test_on_a_terminal_lines_go_to_the_file_only(caplog):
    out = io.StringIO()
    records = run(Console(file=out, force_terminal=True, width=140), caplog)
    assert "7/7" in out.getvalue()
    assert len(records) == 3
    assert all(record.file_only for record in records)


def test_a_pause_is_not_charged_to_the_speed(clock, caplog):
    with caplog.at_level(logging.INFO, logger="megam3"):
        with TrainingProgress(4, log_every_steps=2, console=Console(file=io.StringIO())) as progress:
            clock(1.0)
            progress.update(1, FIGURES, num_tokens=100)
            with progress.paused():
                clock(50.0)  # an evaluation
            clock(1.0)
            progress.update(2, FIGURES, num_tokens=100)
    assert "  100 tokens/s  0:52 left" in caplog.messages[0]


def test_off_the_main_rank_nothing_is_shown_or_logged(caplog):
    out = io.StringIO()
    assert run(Console(file=out, force_terminal=True, width=140), caplog, active=False) == []
    assert out.getvalue() == ""


def test_remaining_time_counts_only_the_steps_of_this_run():
    progress = TrainingProgress(total_steps=100, start_step=90)
    assert progress.remaining_seconds(92, progress._started + 4.0) == pytest.approx(16.0)
    assert progress.remaining_seconds(100, time.monotonic()) == 0.0
