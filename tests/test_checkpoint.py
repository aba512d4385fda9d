import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megam3.batch import Progress
from megam3.checkpoint import (
    RunState,
    check_resumable,
    find_problem,
    has_same_layout,
    newest_complete,
    read_state,
    save_checkpoint,
    set_aside,
)
from megam3.errors import CheckpointError

STATE = RunState(
    progress=Progress(step=3, tokens=50),
    world_size=2,
    zero_stage=3,
    model_signature="model-a",
    data_fingerprint="plan:a",
    layout="2 ranks, stage 3",
    recipe={"name": "x"},
)


@pytest.fixture
def model_files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return str(folder)


def _save(run_dir, model_files, step, keep=3):
    def write(folder):
        os.makedirs(f"{folder}/engine")
        with open(f"{folder}/engine/weights.bin", "wb") as stream:
            stream.write(bytes(range(256)) * step)

    return save_checkpoint(
        str(run_dir), replace(STATE, progress=Progress(step=step)), write, model_files, keep
    )


def test_a_saved_checkpoint_is_complete_and_holds_its_state(tmp_path, model_files):
    folder = _save(tmp_path, model_files, 7)
    assert find_problem(folder) is None
    assert read_state(folder) == replace(STATE, progress=Progress(step=7))
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-000007"
    assert sorted(os.listdir(folder)) == ["COMPLETE", "engine", "manifest.json", "model", "state.json"]


def test_only_the_newest_are_kept_by_step_and_not_by_name(tmp_path, model_files):
    for step in (999_998, 999_999, 1_000_000):
        _save(tmp_path, model_files, step, keep=2)
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
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, model_files, damage, problem):
    _save(tmp_path, model_files, 1)
    damage(_save(tmp_path, model_files, 2))
    said = []
    assert newest_complete(str(tmp_path), said.append).endswith("step-000001")
    assert problem in said[0]
    assert "step-000002" in said[0]


def test_without_any_whole_checkpoint_the_run_stops(tmp_path, model_files):
    os.remove(f"{_save(tmp_path, model_files, 1)}/COMPLETE")
    with pytest.raises(
        CheckpointError, match=r"step-000001.*at least one complete checkpoint.*train.resume=never"
    ):
        newest_complete(str(tmp_path), lambda line: None)


def test_no_checkpoints_at_all_is_a_fresh_start(tmp_path):
    assert newest_complete(str(tmp_path), pytest.fail) is None


def test_a_save_that_dies_stays_invisible_and_is_cleaned_up_by_the_next(tmp_path, model_files):
    def dies(folder):
        raise OSError("disk full")

    _save(tmp_path, model_files, 1)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(str(tmp_path), STATE, dies, model_files, 3)
    assert newest_complete(str(tmp_path), pytest.fail).endswith("step-000001")
    _save(tmp_path, model_files, 4)
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


def test_every_damage_is_in_exactly_one_rank_s_share(tmp_path, model_files):
    folder = _save(tmp_path, model_files, 1)
    for file in ("engine/weights.bin", "model/config.json", "state.json"):
        path, intact = Path(folder, file), Path(folder, file).read_bytes()
        path.write_bytes(intact + b" ")
        found = [find_problem(folder, share, 2) for share in range(2)]
        assert sorted(found, key=str) == [None, f"{file} was changed after writing"]
        path.write_bytes(intact)
    assert [find_problem(folder, share, 2) for share in range(2)] == [None, None]


def test_checkpoints_of_an_earlier_run_are_set_aside_and_not_lost(tmp_path, model_files):
    assert set_aside(str(tmp_path)) is None
    for number in (1, 2):
        _save(tmp_path, model_files, 1000)
        assert set_aside(str(tmp_path)) == f"{tmp_path}/checkpoints.before-{number}"
        assert find_problem(f"{tmp_path}/checkpoints.before-{number}/step-001000") is None
    # without this, the older run's higher step numbers would make the new checkpoint the one that is pruned
    assert find_problem(_save(tmp_path, model_files, 5, keep=1)) is None
