"""What is read from a run folder, complete or not."""

import json
from pathlib import Path

import pytest

from megam3.errors import DataError
from megam3.report.record import Point, flatten, read_run
from tests.report.run_folders import write_run


def test_a_complete_run(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", "named"))
    assert (run.name, run.last_step, run.notes) == ("named", 4, [])
    assert run.series["loss/dense"] == [Point(1, 8.5), Point(2, 4.25), Point(4, 2.125)]
    assert run.num_nonfinite == 1
    assert not [name for name in run.series if name.startswith("eval/") or name in ("step", "nonfinite")]
    assert [evaluation.step for evaluation in run.evaluations] == [2, 4]
    assert [manifest.name for manifest in run.manifests] == ["pairs"]
    assert run.environment["host"] == "node7"


def test_memory_is_that_of_the_last_start(tmp_path: Path) -> None:
    memory = read_run(write_run(tmp_path / "run")).memory
    assert memory is not None
    assert (memory.measured, memory.planned, memory.what) == (2.91, 3.0, "device allocations")
    assert memory.parts == {"weights": 2.25, "score matrices": 0.75, "peak": 3.0}


def test_memory_without_a_plan(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "log.txt").write_text("… INFO peak memory after 3 steps: 0.56 GiB (the whole process)\n")
    memory = read_run(folder).memory
    assert memory is not None
    assert (memory.measured, memory.planned, memory.parts) == (0.56, None, {})


def test_a_step_written_twice_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with open(folder / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({"step": 4, "loss/total": 0.125}) + '\n{"step": 5, "loss/to')
    assert read_run(folder).series["loss/total"][-2:] == [Point(3, 4.0 / 3), Point(4, 0.125)]


def test_an_evaluation_after_the_run_is_the_newest(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "eval" / "heldout.json").write_text((folder / "eval" / "step-000002-heldout.json").read_text())
    assert [evaluation.step for evaluation in read_run(folder).evaluations] == [2, 4, None]


def test_what_is_missing_or_damaged_becomes_a_note(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "recipe.yaml").write_text("name: [")
    (folder / "env.json").unlink()
    (folder / "log.txt").unlink()
    (folder / "eval" / "step-000003-x.json").write_text('{"modes": 3}')
    run = read_run(folder)
    assert run.name == "run"
    assert run.memory is None
    assert run.manifests == []
    for file in ("recipe.yaml", "env.json", "log.txt", "eval/step-000003-x.json"):
        assert any(note.startswith(file) for note in run.notes), (file, run.notes)


def test_a_store_that_is_gone_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    path = folder / "store" / "pairs" / "manifest.json"
    path.unlink()
    assert read_run(folder).notes == [f"data mix of pairs: there is no {path}"]
    path.write_text("{}")
    assert "data mix of pairs: store file" in read_run(folder).notes[0]


def test_no_folder_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"run folder = '.*nowhere': is not a folder; name the folder of a run"
    ):
        read_run(tmp_path / "nowhere")
    with pytest.raises(
        DataError, match=r"holds no figures: neither rows in metrics.jsonl nor files in eval/"
    ):
        read_run(tmp_path)


def test_flatten_keeps_empty_parts_out() -> None:
    assert flatten({"a": {"b": [1, {"c": None}], "d": {}}}) == {"a.b.0": 1, "a.b.1.c": None}
