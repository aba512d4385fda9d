"""What the guard says of a run: that a folder is taken, and that steps are too long for the scheduler's
warning."""

import os
import types
from pathlib import Path

import pytest

from megam3.errors import ConfigError
from megam3.obs import guard as guard_module
from megam3.obs import heartbeat as heartbeat_module
from megam3.obs.guard import RunGuard


def test_a_folder_is_held_from_entering_to_leaving(tmp_path: Path) -> None:
    with RunGuard(str(tmp_path), 60.0, {}) as guard:
        guard.take_folder()
        guard.fence()
        with pytest.raises(ConfigError, match=rf"another run uses this folder: process {os.getpid()}"):
            RunGuard(str(tmp_path), 60.0, {}).take_folder()
    assert not (tmp_path / "lease.json").exists()
    with RunGuard(str(tmp_path), 60.0, {}) as guard:
        guard.take_folder()
        (tmp_path / "lease.json").unlink()
        with pytest.raises(ConfigError, match="lease.json was removed"):
            guard.fence()


def test_a_folder_that_cannot_be_written_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run folder = .*file/run.*: cannot be written \("):
        RunGuard(str(tmp_path / "file" / "run"), 60.0, {}).take_folder()


def test_steps_too_long_for_the_warning_are_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    # at the logger itself: which handlers it has depends on what ran in this process before
    monkeypatch.setattr(guard_module.logger, "warning", lambda text, *values: said.append(text % values))
    clock = iter(range(0, 10_000, 200))
    with RunGuard(str(tmp_path), 60.0, {"MEGAM3_WARNING_SECONDS": "300"}) as guard:
        guard.take_folder()
        # not in `time` itself: the watchdog's threads, and others', would take ticks of it
        ticking = types.SimpleNamespace(monotonic=lambda: float(next(clock)))
        monkeypatch.setattr(heartbeat_module, "time", ticking)
        for step in range(4):
            guard.progress(step, 10)
        monkeypatch.undo()
    assert said == [
        "a step takes 200 s, and the scheduler warns 300 s before it kills: a save at the step's end may come"
        " too late; warn earlier (#SBATCH --signal) or save more often (train.save_every_minutes)"
    ]
