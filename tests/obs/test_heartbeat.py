import json
import os
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from megam3.obs import heartbeat as heartbeats
from megam3.obs.heartbeat import Heartbeat


def test_the_file_follows_the_run(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, {"SLURM_JOB_ID": "9"}, seconds=0.02) as heartbeat:
        heartbeat.progress(10, 30)
        time.sleep(0.1)
        heartbeat.progress(12, 30, tokens_per_second=50.0)
        heartbeat.at(12, "save")
        end = time.monotonic() + 60
        path = tmp_path / "heartbeat.json"
        while not path.exists() or json.loads(path.read_text())["phase"] != "save":
            assert time.monotonic() < end
            time.sleep(0.01)
    found = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (found["job"], found["pid"], found["step"], found["total_steps"]) == ("9", os.getpid(), 12, 30)
    assert found["tokens_per_second"] == 50.0
    assert found["seconds_per_step"] >= 0.05
    assert found["eta_seconds"] == found["seconds_per_step"] * 18
    assert datetime.fromisoformat(found["time"]).tzinfo is not None


def test_before_the_second_step_nothing_is_promised(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, {}) as heartbeat:
        heartbeat.progress(5, 30)
    found = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (found["seconds_per_step"], found["eta_seconds"], found["tokens_per_second"]) == (None, None, None)


def test_a_folder_that_is_gone_does_not_end_the_run(tmp_path: Path) -> None:
    with Heartbeat(tmp_path / "gone", {}) as heartbeat:
        heartbeat.at(1, "forward")


def _slow_first_write(
    monkeypatch: pytest.MonkeyPatch, started: threading.Event, goes_on: threading.Event
) -> None:
    write = heartbeats.write_json

    def slowly(path: Path, content: dict, durable: bool) -> None:
        if not started.is_set():
            started.set()
            goes_on.wait(60)
        write(path, content, durable=durable)

    monkeypatch.setattr(heartbeats, "write_json", slowly)


def test_an_older_beat_does_not_land_on_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, goes_on = threading.Event(), threading.Event()
    _slow_first_write(monkeypatch, started, goes_on)
    with Heartbeat(tmp_path, {}) as heartbeat:
        assert started.wait(60)
        heartbeat.at(3, "save")
        threading.Timer(0.1, goes_on.set).start()
    for thread in threading.enumerate():
        if thread.name == "megam3-heartbeat":
            thread.join(60)
    assert json.loads((tmp_path / "heartbeat.json").read_text())["phase"] == "save"


def test_a_file_system_that_hangs_does_not_keep_a_run_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, goes_on = threading.Event(), threading.Event()
    _slow_first_write(monkeypatch, started, goes_on)
    monkeypatch.setattr(heartbeats, "END_SECONDS", 0.05)
    with Heartbeat(tmp_path, {}):
        assert started.wait(60)
    assert not (tmp_path / "heartbeat.json").exists()
    goes_on.set()


def test_a_checkpoint_on_its_way_is_told_from_one_that_is_there(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, {}) as heartbeat:
        heartbeat.at(20, "forward")
        heartbeat.checkpoint(10, 20)
        heartbeat.at(21, "data")
    found = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (found["phase"], found["step"]) == ("data", 21)
    assert (found["saved_step"], found["writing_step"]) == (10, 20)
