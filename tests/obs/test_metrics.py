import contextlib
import errno
import json
import math
import threading

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megam3.obs.metrics import MetricsWriter, read_metrics


def test_lines_are_strict_json_and_flushed_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 2.5})
    writer.write(2, {"loss": math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=lambda x: 1 / 0) for line in lines] == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": None, "nonfinite": {"loss": "inf"}},
    ]
    writer.close()


def test_resuming_keeps_every_step_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the run was killed in the middle of a line
    with MetricsWriter(tmp_path, start_step=3) as writer:
        writer.write(4, {"loss": 40.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_tensorboard_has_the_same_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss/dense": 0.25})
        writer.write(2, {"loss/dense": 0.125})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/dense")] == [(1, 0.25), (2, 0.125)]


def test_bytes_that_are_no_text_spoil_their_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 1.0}\n{"step": 2, \xff\x00 1.0}\n["step"]\n{"step": "x"}\n{"step": 3}\n'
    )
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    with MetricsWriter(tmp_path, start_step=3):
        pass
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 3}\n'


def test_off_the_main_rank_nothing_is_written(tmp_path):
    with MetricsWriter(tmp_path / "run", active=False) as writer:
        writer.write(1, {"loss": 2.5})
        writer.flush()
    assert not (tmp_path / "run").exists()


def test_a_full_disk_under_tensorboard_is_raised_by_the_next_call_and_told_once(tmp_path, monkeypatch):
    def full(writer, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    told = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 1.0})
    writer.flush()
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)

    def write_on() -> None:
        for step in range(2, 50):
            writer.write(step, {"loss": 1.0})
            writer.flush()

    with pytest.raises(OSError, match="No space left"):
        write_on()
    with contextlib.suppress(OSError):
        writer.close()
    assert told == []
    threading.excepthook("given back")
    assert told == ["given back"]


def test_other_errors_of_threads_keep_their_traceback(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: told.append(failed.exc_type))
    with MetricsWriter(tmp_path):
        thread = threading.Thread(target=lambda: 1 / 0)
        thread.start()
        thread.join()
    assert told == [ZeroDivisionError]
