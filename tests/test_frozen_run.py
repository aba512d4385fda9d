"""Runs with frozen parts and rates by layer: under ZeRO-3 on two ranks, continued on one rank at stage 1, and
with other rates; other frozen parts are refused."""

import pytest

from tests.launches import Workplace, make_workplace, train_calls
from tests.ranks import run_ranks

OPTIONS = [
    "model.freeze=[embeddings, layers 0..0]",
    "optim.layer_decay=0.5",
    "optim.lexical_lr=0.01",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("frozen"))


@pytest.mark.ranks
def test_frozen_parts_and_rates_survive_other_stages_and_rates(place: Workplace) -> None:
    def call(name: str, steps: int, template: str, options: list[str]) -> dict:
        settings = ["name=run", f"train.steps={steps}", f"engine.template={template}", *options]
        return {"name": name, "arguments": [place.recipe, *settings]}

    first = run_ranks(train_calls, 2, [call("first", 2, "zero3", OPTIONS)])[0]
    other = ["model.freeze=[embeddings]", *OPTIONS[1:]]
    calls = [
        call("stage", 3, "zero1", OPTIONS),
        call("rates", 4, "zero1", [OPTIONS[0], "optim.layer_decay=0.8"]),
        call("thawed", 5, "zero1", other),
    ]
    later = run_ranks(train_calls, 1, calls)[0]
    said = {name: result["said"] for name, result in {**first, **later}.items()}
    codes = {name: result["code"] for name, result in {**first, **later}.items()}
    assert {name: codes[name] for name in ("first", "stage", "rates")} == {
        "first": 0,
        "stage": 0,
        "rates": 0,
    }, said
    # other rates are other parameter groups: joined by name, not read as if nothing had changed
    assert "joining them by parameter name" in said["rates"]
    assert codes["thawed"] != 0
    assert "parameters of another model" in said["thawed"]
    assert [row["step"] for row in place.rows("run")] == [1, 2, 3, 4]
