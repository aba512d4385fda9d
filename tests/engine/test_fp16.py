"""fp16 with loss scaling, on a CPU, whose kernels compute it: steps that overflow are skipped and counted,
and are no matter of engine.on_nonfinite; a loss that is not finite is."""

import shutil

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from megam3.config.deepspeed import build_deepspeed_config
from megam3.engine.deepspeed import check_precision
from megam3.errors import ConfigError
from tests.launches import make_workplace, train_calls_in_fp16
from tests.ranks import run_ranks
from tests.recipes import make_config

TEMPLATES = ("zero1", "zero2", "zero3")


def test_the_recipe_reaches_deepspeeds_section():
    config = make_config(engine__precision="fp16", engine__template="zero2")
    final = build_deepspeed_config(config, 2, has_gpu=True)
    assert final["fp16"]["enabled"] is True
    assert final["fp16"]["loss_scale"] == 0
    assert final["bf16"] == {"enabled": False}
    assert final["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "fp16" not in build_deepspeed_config(make_config(engine__precision="bf16"), 2, has_gpu=True)


def test_stage_0_has_nothing_to_scale_with():
    config = make_config(engine__precision="fp16", engine__template="zero0")
    with pytest.raises(
        ConfigError, match="engine.precision = 'fp16'.*use engine.template: zero1, zero2 or zero3"
    ):
        build_deepspeed_config(config, 1)


@pytest.mark.parametrize(("name", "other"), [("fp16", "bf16"), ("bf16", "fp16")])
def test_a_device_that_does_not_compute_in_it_is_named(name, other, monkeypatch):
    device = type(get_accelerator())
    monkeypatch.setattr(device, f"is_{other}_supported", lambda self: True)
    monkeypatch.setattr(device, f"is_{name}_supported", lambda self: True)
    final = build_deepspeed_config(make_config(engine__precision=name, engine__template="zero2"), 1)
    check_precision(final)
    monkeypatch.setattr(device, f"is_{name}_supported", lambda self: None)
    with pytest.raises(ConfigError) as caught:
        check_precision(final)
    where = get_accelerator().device_name()
    assert str(caught.value) == (
        f"engine.precision = '{name}': this machine's {where} does not compute in it; use {other} or fp32"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_workplace(tmp_path_factory.mktemp("fp16"))


@pytest.fixture(scope="module")
def calls(place):
    poisoned = place.folder / "poisoned"
    shutil.copytree(place.folder / "model", poisoned)
    torch.save(
        {"weight": torch.zeros(1, 32), "bias": torch.tensor([float("nan")])}, poisoned / "sparse_linear.pt"
    )

    def call(name, *fields):
        common = ["model.hidden_dropout=0.0", "model.attention_dropout=0.0", "train.steps=8", f"name={name}"]
        return {"name": name, "arguments": [place.recipe, *common, *fields]}

    made = [call("fp32", "engine.template=zero1", "engine.precision=fp32")]
    for template in TEMPLATES:
        made.append(call(template, f"engine.template={template}", "engine.precision=fp16"))
    chunks = "data.batch.chunk_tokens=120"
    made.append(call("chunks", "engine.template=zero2", "engine.precision=fp16", chunks))
    made.append(call("poisoned", "engine.precision=fp16", f"model.path={poisoned}"))
    return run_ranks(train_calls_in_fp16, 1, made)[0]


@pytest.mark.ranks
@pytest.mark.parametrize("name", [*TEMPLATES, "chunks"])
def test_training_follows_fp32(place, calls, name):
    assert calls[name]["code"] == 0, calls[name]["said"]
    exact, half = place.rows("fp32"), place.rows(name)
    assert half[0]["loss/total"] == pytest.approx(exact[0]["loss/total"], rel=1e-2)
    scales = [row["optim/loss_scale"] for row in half]
    skipped = sum(a > b for a, b in zip(scales, scales[1:]))
    assert f"({skipped} so far)" in calls[name]["said"] or skipped == 0
    taken = [row for row, scale, after in zip(half, scales, scales[1:]) if after == scale]
    assert len(taken) >= 4, f"loss scaling found no scale in 8 steps: {scales}"
    # the same first step, once the scale fits: its norm is the unscaled one
    assert taken[0]["optim/grad_norm"] == pytest.approx(exact[skipped]["optim/grad_norm"], rel=0.5)


@pytest.mark.ranks
def test_the_gradient_cache_gives_the_same_first_loss(place, calls):
    """Later losses differ: its own rounding may overflow at another step."""
    plain, chunked = place.rows("zero2"), place.rows("chunks")
    assert chunked[0]["loss/total"] == pytest.approx(plain[0]["loss/total"], rel=1e-3)


@pytest.mark.ranks
def test_a_loss_that_is_not_finite_still_stops(calls):
    assert calls["poisoned"]["code"] != 0
    assert "losses and gradients must be finite" in calls["poisoned"]["said"]
    assert "so far)" not in calls["poisoned"]["said"]
