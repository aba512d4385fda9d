"""Runs with a residual block in the multi-vector head: under ZeRO-3 on two ranks, continued on one rank at
stage 0, exported for PyLate; the published layout is refused by name."""

from pathlib import Path

import pytest
import torch

from megam3.checkpoint import consolidated_weights
from megam3.cli import main
from megam3.config.schema import ModelConfig
from megam3.embedder import M3Embedder
from megam3.model.m3 import represent
from megam3.model.pretrained import load_m3
from megam3.packed_texts import pack_texts
from tests.factory import random_token_ids
from tests.launches import Workplace, make_workplace, train_calls
from tests.ranks import run_ranks

BLOCK = {"multi_vector_hidden": 48, "multi_vector_activation": "gelu"}
OPTIONS = [*(f"model.{name}={value}" for name, value in BLOCK.items()), "optim.lr=0.001"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("projection"))


def call(place: Workplace, name: str, steps: int, template: str, options: list[str]) -> dict:
    settings = ["name=run", f"train.steps={steps}", f"engine.template={template}", *options]
    return {"name": name, "arguments": [place.recipe, *settings]}


@pytest.mark.ranks
def test_a_block_trains_resumes_at_another_stage_and_is_exported(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run_ranks(train_calls, 2, [call(place, "zero3", 2, "zero3", OPTIONS)])[0]
    calls = [
        call(place, "zero0", 4, "zero0", OPTIONS),
        call(place, "plain", 5, "zero0", OPTIONS[-1:]),
        call(place, "half", 5, "zero0", ["model.multi_vector_activation=gelu"]),
    ]
    later = run_ranks(train_calls, 1, calls)[0]
    results = {**first, **later}
    said = {name: result["said"] for name, result in results.items()}
    assert [results[name]["code"] for name in ("zero3", "zero0")] == [0, 0], said
    assert "parameters of another model" in said["plain"]
    assert "model.multi_vector_activation = 'gelu': is the activation of the block" in said["half"]
    assert [row["step"] for row in place.rows("run")] == [1, 2, 3, 4]
    for step in (2, 4):
        check_export(place, step)
    checkpoint = place.run("run") / "checkpoints" / "step-000004"
    assert main(["export", str(checkpoint), str(place.folder / "refused")]) != 0
    assert "chain of layers; use --format pylate" in capsys.readouterr().err


def check_export(place: Workplace, step: int) -> None:
    """The exported folder represents as the checkpoint does; every part of the block has moved."""
    folder = str(place.folder / "model")
    checkpoint, out = place.run("run") / "checkpoints" / f"step-{step:06d}", place.folder / f"out-{step}"
    state = consolidated_weights(str(checkpoint))
    live = load_m3(folder, ModelConfig(path=folder, **BLOCK)).eval()
    start = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    live.load_state_dict(state)
    for name in start:
        if name.startswith("multi_vector_head.") and name.endswith("weight"):
            assert (state[name] - start[name]).abs().max() > 1e-5, name
    assert main(["export", str(checkpoint), str(out), "--format", "pylate"]) == 0
    assert {place.name for place in Path(out).glob("*_Dense")} == {"1_Dense", "2_Dense", "3_Dense"}
    texts = pack_texts(random_token_ids([5, 17, 9]))
    with torch.no_grad():
        theirs = represent(M3Embedder(out, device="cpu").model, texts)
        for ours, other in zip(represent(live, texts).floats(), theirs.floats()):
            torch.testing.assert_close(ours, other, rtol=0, atol=1e-5)
