"""fp16 with loss scaling, stopped and started again: scale, hysteresis and steps since the last overflow
are part of a checkpoint, so that the run is the undisturbed one bit for bit."""

import pytest

from tests.launches import Workplace, make_workplace, train_calls_in_fp16
from tests.ranks import run_ranks

TEMPLATES = ("zero1", "zero2", "zero3")
STOPS = (2, 6)
"""Behind the first overflows, when the scale is on its way down, and behind a few steps that were taken."""
NUM_STEPS = 14


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("fp16-run"))


@pytest.fixture(scope="module")
def calls(place: Workplace) -> dict[str, dict]:
    made = []
    for template in TEMPLATES:
        common = [place.recipe, f"engine.template={template}", "engine.precision=fp16"]
        common += [f"train.steps={NUM_STEPS}", "optim.lr=1.0e-2"]
        made.append({"name": f"{template} whole", "arguments": [*common, f"name={template}-whole"]})
        arguments = [*common, f"name={template}-stopped"]
        for step in STOPS:
            made.append(
                {"name": f"{template} to {step}", "arguments": arguments, "signal": (0, step, "SIGTERM")}
            )
        made.append({"name": f"{template} end", "arguments": arguments})
    # the checkpoint of one layout under another: joined by name, the scale is the saved one
    elastic = [place.recipe, "name=elastic", "engine.precision=fp16", "optim.lr=1.0e-2"]
    made.append({"name": "elastic begun", "arguments": [*elastic, "engine.template=zero1", "train.steps=6"]})
    made.append({"name": "elastic end", "arguments": [*elastic, "engine.template=zero3", "train.steps=9"]})
    return run_ranks(train_calls_in_fp16, 2, made)[0]


@pytest.mark.ranks
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_stopped_run_is_the_undisturbed_one_bit_for_bit(
    place: Workplace, calls: dict[str, dict], template: str
) -> None:
    assert calls[f"{template} whole"]["code"] == 0, calls[f"{template} whole"]["said"]
    for step in STOPS:
        assert calls[f"{template} to {step}"]["code"] == 143, calls[f"{template} to {step}"]["said"]
    assert calls[f"{template} end"]["code"] == 0, calls[f"{template} end"]["said"]
    whole, stopped = place.figures(f"{template}-whole"), place.figures(f"{template}-stopped")
    assert [row["step"] for row in whole] == list(range(1, NUM_STEPS + 1))
    scales = [row["optim/loss_scale"] for row in whole]
    assert scales[0] > scales[-1], "no overflow: nothing of the scaler is tested"
    assert stopped == whole


@pytest.mark.ranks
def test_at_another_stage_the_scale_goes_on_as_it_was(place: Workplace, calls: dict[str, dict]) -> None:
    assert calls["elastic end"]["code"] == 0, calls["elastic end"]["said"]
    scales = [row["optim/loss_scale"] for row in place.rows("elastic")]
    whole = [row["optim/loss_scale"] for row in place.rows("zero1-whole")]
    assert scales[6] == whole[6]
    assert whole[6] < whole[0]
