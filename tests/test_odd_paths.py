"""Folders whose names hold spaces, quotes, letters of any script, and even a line break: a run trains,
resumes, evaluates and is exported there."""

import json
from pathlib import Path

import pytest

from megam3.cli import main
from megam3.config.check import check_config
from megam3.errors import ConfigError
from tests.launches import Workplace, make_workplace, train_calls
from tests.ranks import run_ranks
from tests.recipes import make_config

NAMES = ["with space and 'quotes\"", "سلام-日本語-ñ", "two\nlines", "$(touch x); `y` & #1"]


@pytest.fixture(scope="module", params=NAMES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("odd") / request.param
    folder.mkdir()
    made = make_workplace(folder)
    # the recipe of other tests writes paths as they are, which YAML reads otherwise here
    Path(made.recipe).write_text(Path(made.recipe).read_text().replace(str(folder), "FOLDER"))
    return made


def overrides(place: Workplace) -> list[str]:
    """Paths as YAML strings; JSON's are such."""
    folder = str(place.folder)
    fields = {
        "output_dir": f"{folder}/runs",
        "model.path": f"{folder}/model",
        "data.train.0.paths": [f"{folder}/pairs.jsonl"],
        "data.store_dir": f"{folder}/store",
        "evaluation.folders": [f"{folder}/beir"],
    }
    return [f"{field}={json.dumps(value, ensure_ascii=False)}" for field, value in fields.items()]


def test_a_run_in_a_folder_of_an_odd_name(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        place.recipe,
        "name=run",
        "train.save_every_steps=2",
        "train.evaluate_every_steps=4",
        *overrides(place),
    ]
    calls = [
        {"name": "first", "arguments": [*given, "train.steps=2", "data.num_workers=1"]},
        {"name": "second", "arguments": [*given, "train.steps=4"]},
    ]
    said = run_ranks(train_calls, 1, calls)[0]
    assert [said[name]["code"] for name in ("first", "second")] == [0, 0], said
    assert "starting at step 2" in said["second"]["said"]
    assert [row["step"] for row in place.rows("run")] == [1, 2, 3, 4]
    run = place.run("run")
    assert list((run / "eval").glob("*.json"))
    # the resolved recipe, read again, is the recipe
    monkeypatch.chdir(place.folder)
    assert main(["show-config", str(run / "recipe.yaml")]) == 0
    assert main(["export", str(run / "checkpoints" / "step-000004"), str(place.folder / "out")]) == 0
    assert main(["report", str(run)]) == 0
    assert (run / "report.html").is_file()
    assert not (place.folder / "x").exists()


@pytest.mark.parametrize("folder", ["/data/[old] runs", "/data/what?", "a*b"])
def test_a_run_folder_is_no_pattern(folder: str) -> None:
    """DeepSpeed 0.19.8 finds no checkpoint in `/data/[old] runs/x`: `[old]` stands for one of o, l, d."""
    with pytest.raises(ConfigError, match=r"output_dir = .*: leads to a folder with [*?\[] in its path"):
        check_config(make_config(output_dir=folder), 1, files=False)
