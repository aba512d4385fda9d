"""A run that is continued on other ranks and ZeRO stages, through the trainer: same rows, same losses to fp32
noise."""

import json

import pytest

from tests.launches import Workplace, make_workplace, train_calls
from tests.ranks import run_ranks

SETTINGS = [
    "model.hidden_dropout=0",
    "model.attention_dropout=0",
    "optim.schedule=constant",
    "optim.warmup_ratio=0",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("elastic"))


@pytest.fixture(scope="module")
def said(place: Workplace) -> dict[str, str]:
    def call(run: str, steps: int, template: str, *more: str, name: str = "") -> dict:
        arguments = [
            place.recipe,
            *SETTINGS,
            f"name={run}",
            f"train.steps={steps}",
            f"engine.template={template}",
            *more,
        ]
        return {"name": name or f"{run}-{steps}", "arguments": arguments}

    first = run_ranks(train_calls, 2, [call("whole", 6, "zero1"), call("moving", 2, "zero1")])[0]
    second = run_ranks(train_calls, 1, [call("moving", 4, "zero3")])[0]
    other = ["train.seed=7", "train.resume_with_other_data=true"]
    last = [call("moving", 6, "zero0"), call("moving", 7, "auto", *other, name="other data")]
    third = run_ranks(train_calls, 2, last)[0]
    results = {**first, **second, **third}
    assert all(result["code"] == 0 for result in results.values()), results
    return {name: result["said"] for name, result in results.items()}


@pytest.mark.ranks
def test_two_ranks_then_one_then_two_see_the_rows_and_losses_of_the_uninterrupted_run(
    place: Workplace, said: dict[str, str]
) -> None:
    whole, moving = place.rows("whole"), place.rows("moving")[:6]
    for name in ("step", "data/samples", "data/tokens", "data/truncated_texts"):
        assert [row[name] for row in moving] == [row[name] for row in whole]
    for name in ("loss/total", "optim/grad_norm"):
        assert [row[name] for row in moving] == pytest.approx(
            [row[name] for row in whole], rel=2e-4, abs=2e-5
        )


@pytest.mark.ranks
def test_the_log_says_that_files_were_cut_otherwise(said: dict[str, str]) -> None:
    assert (
        "cut otherwise (2 ranks at ZeRO stage 1, now 1 ranks at ZeRO stage 3): joining them by parameter name"
        in said["moving-4"]
    )
    assert "cut otherwise (1 ranks at ZeRO stage 3, now 2 ranks at ZeRO stage 0)" in said["moving-6"]


@pytest.mark.ranks
def test_auto_continues_a_run_of_another_template_and_records_its_choice(
    place: Workplace, said: dict[str, str]
) -> None:
    assert "engine.template=auto: zero2 on 2 CPU rank(s)" in said["other data"]
    assert "cut otherwise (2 ranks at ZeRO stage 0, now 2 ranks at ZeRO stage 2)" in said["other data"]
    record = json.loads((place.run("moving") / "engine_choice.json").read_text())
    assert record["fields"]["template"] == "zero2"
    assert "template: zero2" in (place.run("moving") / "recipe.yaml").read_text()


@pytest.mark.ranks
def test_other_data_is_accepted_when_asked_for(said: dict[str, str]) -> None:
    assert "continuing at step 6 on other data, as train.resume_with_other_data asks" in said["other data"]


@pytest.mark.ranks
def test_planned_and_measured_memory_are_logged(said: dict[str, str]) -> None:
    assert "Memory of one of 2 ranks in GiB: zero1 (ZeRO 1), fp32" in said["whole-6"]
    assert "peak memory after 3 steps" in said["whole-6"]
