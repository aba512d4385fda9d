"""Checkpoints written while training goes on: what they hold, when they get their name, and who hears of
errors."""

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megam3.batch import Progress
from megam3.checkpoint import (
    CheckpointWriter,
    Retention,
    consolidated_weights,
    find_problem,
    list_steps,
    newest_complete,
)
from megam3.dist import comm
from megam3.engine.consolidate import weights_only_loads
from megam3.errors import CheckpointError
from tests.checkpoint.writing import STATE
from tests.launches import ROOT, Workplace, make_workplace, train_calls
from tests.ranks import run_ranks


class Engine:
    """Weights that move, and a disk that can be held up or refuse."""

    def __init__(self) -> None:
        self.weights, self.gate, self.error = torch.zeros(1000), threading.Event(), None
        self.gate.set()

    def write(self, folder: str, put_off=None) -> list[str]:
        os.makedirs(f"{folder}/engine", exist_ok=True)
        name = f"engine/rank-{comm.rank()}.pt"
        (put_off or (lambda contents, path, save: save(contents, path)))(
            {"weights": self.weights}, f"{folder}/{name}", self.to_disk
        )
        return [name]

    def to_disk(self, contents, path) -> None:
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        torch.save(contents, path)


def make_writer(run_dir: Path, engine: Engine, **options) -> CheckpointWriter:
    if comm.is_main():
        (run_dir / "model").mkdir(parents=True, exist_ok=True)
        (run_dir / "model" / "config.json").write_text("{}")
    keep = options.pop("keep", 3)
    return CheckpointWriter(
        str(run_dir), engine.write, str(run_dir / "model"), lambda: Retention(keep=keep), **options
    )


def at(step: int):
    return replace(STATE, progress=Progress(step=step))


def saved_weights(run_dir: Path, step: int) -> torch.Tensor:
    path = run_dir / "checkpoints" / f"step-{step:06d}" / "engine" / f"rank-{comm.rank()}.pt"
    return torch.load(path, weights_only=True)["weights"]


def test_weights_may_move_while_they_are_written_and_the_name_comes_last(tmp_path, caplog):
    engine = Engine()
    writer = make_writer(tmp_path, engine)
    engine.gate.clear()
    writer.save(at(5))
    engine.weights.fill_(7.0)
    assert (writer.is_pending, writer.is_writing, list_steps(str(tmp_path))) == (True, True, [])
    engine.gate.set()
    while writer.is_writing:
        time.sleep(0.01)
    assert list_steps(str(tmp_path)) == []  # on the disk, and still without a name
    with caplog.at_level(logging.INFO):
        writer.finish()
    assert not writer.is_pending
    assert newest_complete(str(tmp_path), pytest.fail).endswith("step-000005")
    assert torch.equal(saved_weights(tmp_path, 5), torch.zeros(1000))
    assert "step-000005: 0.0 MiB in" in caplog.text
    assert "of which training waited" in caplog.text


def test_a_run_folder_in_the_working_folder_is_as_good_as_any(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_writer(Path("run"), Engine()).save(at(1), wait=True)
    assert list_steps("run") == [1]


def test_one_copy_is_held_at_a_time(tmp_path):
    engine = Engine()
    writer = make_writer(tmp_path, engine)
    engine.gate.clear()
    writer.save(at(1))
    threading.Timer(0.3, engine.gate.set).start()
    writer.save(at(2))  # waits for the first, and names it
    assert list_steps(str(tmp_path)) == [1]
    writer.finish()
    assert list_steps(str(tmp_path)) == [1, 2]


@pytest.mark.parametrize("in_background", [True, False])
def test_a_save_that_is_waited_for_is_there_when_it_returns(tmp_path, in_background):
    writer = make_writer(tmp_path, Engine(), in_background=in_background)
    writer.save(at(1), wait=True)
    assert find_problem(str(tmp_path / "checkpoints" / "step-000001")) is None
    if not in_background:
        writer.save(at(2))
        assert (list_steps(str(tmp_path)), writer.is_pending) == ([1, 2], False)


def test_without_host_memory_a_file_is_written_at_once_and_that_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("megam3.checkpoint.writer.available_bytes", lambda: 4399)
    writer = make_writer(tmp_path, engine := Engine())
    writer.save(at(1))
    engine.weights.fill_(7.0)
    writer.finish()
    assert "no host memory for a copy of rank-0.pt" in caplog.text
    assert "train.checkpoint_writing=plain" in caplog.text
    assert torch.equal(saved_weights(tmp_path, 1), torch.zeros(1000))
    caplog.clear()
    monkeypatch.setattr("megam3.checkpoint.writer.available_bytes", lambda: 4401)
    writer.save(at(2), wait=False)
    writer.finish()
    assert "host memory" not in caplog.text


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device.*free space"),
        (RuntimeError("inline_container.cc: unexpected pos"), "bytes free.*unexpected pos"),
        (ValueError("surprise"), "cannot be written: ValueError: surprise"),
    ],
)
def test_an_error_of_the_thread_is_raised_when_the_checkpoint_is_to_get_its_name(tmp_path, error, message):
    engine = Engine()
    writer = make_writer(tmp_path, engine)
    writer.save(at(1), wait=True)
    engine.error = error
    writer.save(at(2))
    with pytest.raises(CheckpointError, match=message):
        writer.finish()
    assert (list_steps(str(tmp_path)), writer.is_pending) == ([1], False)
    engine.error = None
    writer.save(at(3), wait=True)
    assert list_steps(str(tmp_path)) == [1, 3]


def _fails_on_rank_1(folder: str) -> list[str]:
    engine = Engine()
    writer = make_writer(Path(folder), engine)
    comm.barrier()
    writer.save(at(1))
    writer.finish()
    engine.error = OSError(errno.ENOSPC, "No space left on device") if comm.rank() == 1 else None
    writer.save(at(2))
    try:
        writer.finish()
    except CheckpointError as error:
        return [str(error), *os.listdir(f"{folder}/checkpoints")]
    return ["no error"]


@pytest.mark.ranks
def test_one_ranks_full_disk_is_every_ranks_error_and_names_it(tmp_path):
    said = run_ranks(_fails_on_rank_1, 2, str(tmp_path))
    assert said[0][0] == said[1][0]
    assert "rank 1: a checkpoint cannot be written: [Errno 28] No space left on device" in said[0][0]
    assert "step-000001" in said[0]
    assert "step-000002" not in said[0]


DIES = """
import os, signal, sys, threading
from pathlib import Path
from megam3.checkpoint import save, writer
from tests.checkpoint.test_writer import Engine, at, make_writer

folder, phase = Path(sys.argv[1]), sys.argv[2]
engine = Engine()
kept = make_writer(folder, engine, keep=1)
kept.save(at(1), wait=True)

def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)

if phase == "copy":
    writer.snapshot = die
elif phase == "write":
    engine.to_disk = lambda contents, path: (Path(path).write_bytes(b"half"), die())
elif phase == "flush":
    writer.settle = die
elif phase == "seal":
    save.seal = die
elif phase == "rename":
    save.publish = die
elif phase == "retention":
    save.prune = die
kept.save(at(2))
kept.finish()
"""


@pytest.mark.parametrize("phase", ["copy", "write", "flush", "seal", "rename", "retention"])
def test_kill_9_in_any_phase_loses_nothing_beyond_the_last_complete_one(tmp_path, phase):
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", DIES, str(tmp_path), phase], env=environ, cwd=ROOT, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    newest = newest_complete(str(tmp_path), pytest.fail)
    assert newest.endswith("step-000002" if phase == "retention" else "step-000001")


STAGES = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("writer"))


@pytest.mark.ranks
def test_written_beside_training_and_written_at_once_are_the_same_bytes(place):
    options = ["train.steps=4", "train.save_every_steps=2", "train.checkpoint_writing="]
    calls = [
        {
            "name": f"{how}{stage}",
            "arguments": [
                place.recipe,
                f"name={how}{stage}",
                f"engine.template=zero{stage}",
                *options[:2],
                options[2] + how,
            ],
        }
        for stage in STAGES
        for how in ("async", "plain")
    ]
    results = run_ranks(train_calls, 2, calls)
    for stage in STAGES:
        ways = [f"async{stage}", f"plain{stage}"]
        assert [rank[way]["code"] for rank in results for way in ways] == [0] * 4, results[0][ways[0]]["said"]
        assert place.figures(ways[0]) == place.figures(ways[1])
        for step in (2, 4):
            folders = [place.run(way) / f"checkpoints/step-{step:06d}" for way in ways]
            weights = [consolidated_weights(str(folder)) for folder in folders]
            assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
            names = [list(json.loads((folder / "manifest.json").read_text())) for folder in folders]
            assert names[0] == names[1]
            states = [name for name in names[0] if name.endswith(".pt")]
            assert len(states) == (1 if stage == 0 else 4 if stage == 3 else 3)
            for name in names[0]:
                files = [folder / name for folder in folders]
                if name.endswith(".pt"):
                    assert_equal(*(read_state_dict(file, stage) for file in files))
                elif name != "state.json":  # holds the recipe, and with it the run's name
                    assert files[0].read_bytes() == files[1].read_bytes()


def read_state_dict(path: Path, stage: int) -> dict:
    with weights_only_loads():
        states = torch.load(path)
    if stage == 3 and "optimizer_state_dict" in states:
        # DeepSpeed leaves what pads a rank's part of a parameter as it found the memory: two plain runs
        # differ there as well. Weights are compared without it, by name
        del states["optimizer_state_dict"]["fp32_flat_groups"]
    return states


def assert_equal(one, other) -> None:
    """Bit for bit, types included."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.stride(), one.storage_offset()) == (
            other.dtype,
            other.stride(),
            other.storage_offset(),
        )
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list | tuple) and not hasattr(one, "_fields"):
        assert len(one) == len(other)
        for pair in zip(one, other):
            assert_equal(*pair)
    elif type(one).__name__.endswith("LossScaler"):
        assert vars(one) == vars(other)
    else:
        assert one == other
