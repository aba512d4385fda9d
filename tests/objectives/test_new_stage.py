"""A stage that lives in one file outside the package trains, checkpoints, resumes, checks its section and
warns."""

import math
from pathlib import Path

import pytest

from tests.launches import Workplace, make_workplace, write_jsonl
from tests.objectives.toy_stage import calls_with_this_stage
from tests.ranks import run_ranks

STAGE = ["objective.kind=alignment", "engine.template=zero3"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="module")
def calls(place: Workplace) -> dict[str, dict]:
    texts = write_jsonl(place.folder / "texts.jsonl", [{"text": f"text number {i}"} for i in range(20)])
    arguments = {
        "whole": ["train.steps=12"],
        "half": ["train.steps=12", "train.save_every_steps=4", "name=halves"],
        "bad section": ["objective.scale=1000"],
        "texts": [f"data.train.0.paths=[{texts}]", f"data.store_dir={place.folder}/texts"],
        "test set": [f"evaluation.folders=[{place.folder}/beir]"],
    }
    named = [
        {"name": name, "arguments": [place.recipe, f"name={name.replace(' ', '-')}", *STAGE, *given]}
        for name, given in arguments.items()
    ]
    named[1]["signal"] = (0, 3, "SIGTERM")
    again = {**named[1], "name": "rest"}
    del again["signal"]
    return run_ranks(calls_with_this_stage, 2, [*named, again])[0]


@pytest.mark.ranks
def test_it_trains_on_two_ranks_at_zero_3(calls: dict[str, dict], place: Workplace) -> None:
    assert calls["whole"]["code"] == 0, calls["whole"]["said"]
    rows = place.rows("whole")
    assert [row["step"] for row in rows] == list(range(1, 13))
    first, last = (sum(row["loss/total"] for row in part) for part in (rows[:3], rows[-3:]))
    assert last < 0.75 * first
    assert all(math.isclose(r["loss/total"], 1 - r["alignment/cosine"], abs_tol=1e-5) for r in rows)


@pytest.mark.ranks
def test_it_resumes_exactly(calls: dict[str, dict], place: Workplace) -> None:
    assert calls["half"]["code"] != 0
    assert calls["rest"]["code"] == 0, calls["rest"]["said"]
    assert place.figures("halves") == place.figures("whole")


@pytest.mark.ranks
def test_its_warnings_reach_the_log(calls: dict[str, dict], place: Workplace) -> None:
    log = (Path(place.run("whole")) / "log.txt").read_text()
    assert "step 1: queries and positives are not aligned yet" in log


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bad section", "objective.scale = 1000.0: must be at most 100; lower it"),
        ("texts", 'holds {"text"} records; objective.kind=alignment trains on {"query", "pos"} records'),
        ("test set", "the model of objective.kind=alignment ranks no passages"),
    ],
)
def test_bad_input_to_it_is_one_clear_message(calls: dict[str, dict], name: str, said: str) -> None:
    assert calls[name]["code"] == 2, calls[name]["said"]
    assert said in calls[name]["said"]
    assert "Traceback" not in calls[name]["said"]
