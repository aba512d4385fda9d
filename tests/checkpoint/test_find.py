"""Which checkpoint is found, what counts as damage, and that no damage ends the search."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megam3.batch import Progress
from megam3.checkpoint import (
    check_resumable,
    find_problem,
    folders,
    has_same_layout,
    newest_complete,
    read_state,
    set_aside,
)
from megam3.errors import CheckpointError
from tests.checkpoint.writing import STATE, save_step


def test_a_saved_checkpoint_is_complete_and_holds_its_state(tmp_path):
    folder = save_step(tmp_path, 7)
    assert find_problem(folder) is None
    assert read_state(folder) == replace(STATE, progress=Progress(step=7))
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000007"
    assert sorted(os.listdir(folder)) == ["COMPLETE", "engine", "manifest.json", "model", "state.json"]


def test_only_the_newest_are_kept_by_step_and_not_by_name(tmp_path):
    for step in (999_998, 999_999, 1_000_000):
        save_step(tmp_path, step, keep=2)
    assert sorted(n for n in os.listdir(tmp_path / "checkpoints") if n.startswith("step")) == [
        "step-1000000",
        "step-999999",
    ]
    assert newest_complete(str(tmp_path), pytest.fail).endswith("step-1000000")


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: os.remove(f"{f}/COMPLETE"), "never completed"),
        (lambda f: os.remove(f"{f}/engine/weights.bin"), "engine/weights.bin is missing"),
        (lambda f: Path(f, "engine/weights.bin").write_bytes(b"short"), "engine/weights.bin was changed"),
        (lambda f: Path(f, "engine/weights.bin").write_bytes(bytes(512)), "engine/weights.bin was changed"),
        (lambda f: Path(f, "manifest.json").write_text("{}"), "manifest.json was changed"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage, problem):
    save_step(tmp_path, 1)
    damage(save_step(tmp_path, 2))
    said = []
    assert newest_complete(str(tmp_path), said.append).endswith("step-000001")
    assert problem in said[0]
    assert "step-000002" in said[0]


def test_without_any_whole_checkpoint_the_run_stops(tmp_path):
    os.remove(f"{save_step(tmp_path, 1)}/COMPLETE")
    with pytest.raises(
        CheckpointError, match=r"step-000001.*at least one complete checkpoint.*train.resume=never"
    ):
        newest_complete(str(tmp_path), lambda line: None)


def test_no_checkpoints_at_all_is_a_fresh_start(tmp_path):
    assert newest_complete(str(tmp_path), pytest.fail) is None


def test_a_save_that_dies_stays_invisible_and_is_cleaned_up_by_the_next(tmp_path):
    def dies(folder):
        raise OSError("disk full")

    save_step(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"checkpoint cannot be written.*disk full"):
        save_step(tmp_path, 3, write=dies)
    assert newest_complete(str(tmp_path), pytest.fail).endswith("step-000001")
    save_step(tmp_path, 4)
    assert not [name for name in os.listdir(tmp_path / "checkpoints") if name.endswith(".partial")]


def test_a_checkpoint_of_another_model_is_refused_by_name():
    check_resumable("step-000003", STATE, STATE)
    with pytest.raises(
        CheckpointError, match=r"model_signature = 'model-a'.*parameters of another model.*train.resume=never"
    ):
        check_resumable("step-000003", STATE, replace(STATE, model_signature="model-b"))


def test_another_world_size_or_stage_is_resumable_but_not_file_by_file():
    current = replace(STATE, world_size=4, zero_stage=1, layout="4 ranks, stage 1")
    check_resumable("step-000003", STATE, current)
    assert not has_same_layout(STATE, current)
    assert has_same_layout(STATE, replace(STATE, recipe={"name": "y"}))


def test_reading_a_folder_that_is_no_checkpoint_says_so(tmp_path):
    (tmp_path / "state.json").write_text(json.dumps({}))
    with pytest.raises(
        CheckpointError,
        match=r"must be a complete checkpoint \(never completed\); name a folder checkpoints/step-NNNNNN",
    ):
        read_state(str(tmp_path))


def test_every_damage_is_in_exactly_one_rank_s_share(tmp_path):
    folder = save_step(tmp_path, 1)
    for file in ("engine/weights.bin", "model/config.json", "state.json"):
        path, intact = Path(folder, file), Path(folder, file).read_bytes()
        path.write_bytes(intact + b" ")
        found = [find_problem(folder, share, 2) for share in range(2)]
        assert sorted(found, key=str) == [None, f"{file} was changed after writing"]
        path.write_bytes(intact)
    assert [find_problem(folder, share, 2) for share in range(2)] == [None, None]


def test_checkpoints_of_an_earlier_run_are_set_aside_and_not_lost(tmp_path):
    assert set_aside(str(tmp_path)) is None
    for number in (1, 2):
        save_step(tmp_path, 1000)
        assert set_aside(str(tmp_path)) == f"{tmp_path}/checkpoints.before-{number}"
        assert find_problem(f"{tmp_path}/checkpoints.before-{number}/step-001000") is None
    # without this, the older run's higher step numbers would make the new checkpoint the one that is pruned
    assert find_problem(save_step(tmp_path, 5, keep=1)) is None


def _unreadable(folder: str) -> None:
    os.remove(f"{folder}/manifest.json")
    os.symlink("manifest.json", f"{folder}/manifest.json")  # a loop: every open is an OSError


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda f: Path(f, "COMPLETE").write_bytes(b"\xff\xfe\x00foreign"), "manifest.json was changed"),
        (lambda f: Path(f, "COMPLETE").write_bytes(b""), "manifest.json was changed"),
        (_unreadable, "never completed"),
        (lambda f: (os.remove(f"{f}/state.json"), os.mkdir(f"{f}/state.json")), "state.json is missing"),
    ],
)
def test_foreign_bytes_and_errors_of_the_file_system_are_problems_like_others(tmp_path, damage, problem):
    save_step(tmp_path, 1)
    damage(save_step(tmp_path, 2))
    said = []
    assert newest_complete(str(tmp_path), said.append).endswith("step-000001")
    assert problem in said[0]


@pytest.mark.parametrize(
    ("error", "times"),
    [(OSError(5, "Input/output error"), 3), (ValueError("bytes"), 1), (RecursionError(), 1)],
)
def test_an_error_while_reading_is_a_problem(tmp_path, monkeypatch, error, times):
    folder, calls = save_step(tmp_path, 1), []

    def fails(path):
        calls.append(path)
        raise error

    monkeypatch.setattr(folders, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(folders, "describe_file", fails)
    assert find_problem(folder).startswith(f"cannot be read: {type(error).__name__}")
    assert len(calls) == times


@pytest.mark.parametrize("call", ["stat", "open"])
def test_an_error_that_passes_costs_no_checkpoint(tmp_path, monkeypatch, call):
    save_step(tmp_path, 1)
    newest, said, left = save_step(tmp_path, 2), [], [errno.EIO, errno.ESTALE]
    original = os.stat if call == "stat" else folders.describe_file

    def fails_at_first(path, *given, **named):
        if left and str(path).startswith(newest):
            raise OSError(left.pop(0), "passes")
        return original(path, *given, **named)

    monkeypatch.setattr(folders, "RETRY_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(*((os, "stat") if call == "stat" else (folders, "describe_file")), fails_at_first)
    assert newest_complete(str(tmp_path), said.append) == newest
    assert (said, left) == ([], [])


def test_folders_with_other_names_are_no_checkpoints(tmp_path):
    save_step(tmp_path, 3)
    for name in ("step-000004.bak", "step-", "step-x", "step--1", "step-000009 (copy)"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert newest_complete(str(tmp_path), pytest.fail).endswith("step-000003")


def test_broken_ones_are_set_aside_by_name_once_a_whole_one_is_found(tmp_path):
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    for step in (2, 3):
        os.remove(f"{tmp_path}/checkpoints/step-00000{step}/COMPLETE")
    newest_complete(str(tmp_path), lambda line: None)
    names = {name for name in os.listdir(tmp_path / "checkpoints") if name.startswith("step")}
    assert names == {"step-000001", "step-000002.damaged-1", "step-000003.damaged-1"}


def test_a_step_that_is_asked_for_is_used_and_newer_ones_no_longer_count(tmp_path):
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    assert newest_complete(str(tmp_path), pytest.fail, step=2).endswith("step-000002")
    assert newest_complete(str(tmp_path), pytest.fail).endswith("step-000002")
    assert (tmp_path / "checkpoints" / "step-000003.later-1").is_dir()
    rule = r"train.resume_step = 7: must be a whole checkpoint.*there are: step-000002, step-000001"
    with pytest.raises(CheckpointError, match=rule):
        newest_complete(str(tmp_path), pytest.fail, step=7)


def test_a_state_of_another_version_is_said_to_be_one(tmp_path):
    folder = save_step(tmp_path, 1)
    Path(folder, "state.json").write_text(json.dumps({"progress": {}, "colour": 1}))
    with pytest.raises(CheckpointError, match=r"not one that this version of megam3 reads"):
        read_state(folder, verify=False)
