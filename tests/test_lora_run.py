"""Runs with low-rank adapters: under ZeRO-3 on two ranks, continued on one rank at stages 0 and 2, exported
without adapters; another rank of the adapters is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megam3.checkpoint import consolidated_weights
from megam3.commands import export
from megam3.config.schema import LoraConfig, ModelConfig
from megam3.model.m3 import represent
from megam3.model.pretrained import load_m3
from megam3.packed_texts import pack_texts
from tests.factory import random_token_ids
from tests.launches import Workplace, make_workplace, train_calls
from tests.ranks import run_ranks

LORA = LoraConfig(rank=4, alpha=8.0)
OPTIONS = ["model.lora={rank: 4, alpha: 8.0}", "optim.lr=0.01"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("lora"))


def call(place: Workplace, name: str, steps: int, template: str, options: list[str] = OPTIONS) -> dict:
    settings = ["name=run", f"train.steps={steps}", f"engine.template={template}", *options]
    return {"name": name, "arguments": [place.recipe, *settings]}


@pytest.mark.ranks
def test_adapters_train_resume_at_other_stages_and_leave_a_plain_model(place: Workplace) -> None:
    first = run_ranks(train_calls, 2, [call(place, "zero3", 2, "zero3")])[0]
    other = ["model.lora={rank: 2, alpha: 8.0}", *OPTIONS[1:]]
    calls = [
        call(place, "zero2", 3, "zero2"),
        call(place, "zero0", 4, "zero0"),
        call(place, "other", 5, "zero0", other),
    ]
    later = run_ranks(train_calls, 1, calls)[0]
    results = {**first, **later}
    said = {name: result["said"] for name, result in results.items()}
    assert [results[name]["code"] for name in ("zero3", "zero2", "zero0")] == [0, 0, 0], said
    assert "parameters of another model" in said["other"]
    assert results["other"]["code"] != 0
    assert [row["step"] for row in place.rows("run")] == [1, 2, 3, 4]
    for step in (2, 4):
        check_export(place, step)


def check_export(place: Workplace, step: int) -> None:
    """The exported folder represents as the adapted model does, and the encoder has moved by its adapters
    alone."""
    folder = str(place.folder / "model")
    checkpoint, out = place.run("run") / "checkpoints" / f"step-{step:06d}", place.folder / f"out-{step}"
    state = consolidated_weights(str(checkpoint))
    live = load_m3(folder, ModelConfig(path=folder, lora=LORA)).eval()
    live.load_state_dict(state)
    start = load_file(Path(folder) / "model.safetensors")
    name = "encoder.layer.0.attention.self.query"
    kept = state[f"encoder.{name}.base_layer.weight"]
    assert torch.equal(kept, start[f"{name}.weight"])
    assert state[f"encoder.{name}.lora_B.default.weight"].abs().max() > 0
    assert export.main([str(checkpoint), str(out)]) == 0
    exported = load_file(out / "model.safetensors")
    assert not any("lora" in key or "base_layer" in key for key in exported)
    assert (exported[f"{name}.weight"] - kept).abs().max() > 1e-4
    plain = load_m3(str(out), ModelConfig(path=str(out))).eval()
    texts = pack_texts(random_token_ids([5, 17, 9]))
    with torch.no_grad():
        for ours, theirs in zip(represent(plain, texts).floats(), represent(live, texts).floats()):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
