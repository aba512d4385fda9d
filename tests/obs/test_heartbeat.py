import json
import os
import time
from datetime import datetime
from pathlib import Path

from megam3.obs.heartbeat import Heartbeat


def test_the_file_follows_the_run(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, {"SLURM_JOB_ID": "9"}, seconds=0.02) as heartbeat:
        heartbeat.progress(10, 30)
        time.sleep(0.1)
        heartbeat.progress(12, 30, tokens_per_second=50.0)
        heartbeat.at(12, "save")
        end = time.monotonic() + 20
        while json.loads((tmp_path / "heartbeat.json").read_text())["phase"] != "save":
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
