import io
import logging

import pytest
from rich.console import Console

from megam3.obs.progress import TrainingProgress, format_duration


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3725, "1:02:05")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def run(console, caplog):
    with caplog.at_level(logging.INFO, logger="megam3"):
        with TrainingProgress(7, start_step=2, log_every_steps=3, console=console) as progress:
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


def test_on_a_terminal_a_bar_shows_losses_and_lines_go_to_the_file_only(caplog):
    out = io.StringIO()
    records = run(Console(file=out, force_terminal=True, width=140), caplog)
    assert "7/7" in out.getvalue()
    assert "loss 0.1429" in out.getvalue()
    assert len(records) == 3
    assert all(record.file_only for record in records)


def test_remaining_time_counts_only_the_steps_of_this_run():
    progress = TrainingProgress(total_steps=100, start_step=90)
    assert progress.remaining_seconds(92, progress._started + 4.0) == pytest.approx(16.0)
