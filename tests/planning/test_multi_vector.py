"""A multi-vector head of several layers in the memory plan: weights and kept tensors to the byte, the peak of
a pass against the tensors that were alive."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megam3.config.schema import ModelConfig
from megam3.engine.activations import ActivationMemory
from megam3.export.formats import export
from megam3.model.freeze import freeze_parameters
from megam3.model.m3 import M3Model
from megam3.model.pretrained import load_m3
from megam3.model.projection import Projection
from megam3.planning.memory import activation_bytes, state_bytes
from megam3.planning.multi_vector import kept_entries
from megam3.planning.parameters import head_parameters, num_parameters
from megam3.planning.shapes import ModelShape, Strategy
from megam3.token_layers import TokenLayer, residual_layers
from tests.factory import make_tiny_model_folder
from tests.planning import kernel
from tests.planning.families import build, shape, small
from tests.planning.memory_probe import shape_of
from tests.planning.test_families import DTYPES, live_peak, strategy_for

LENGTHS = [100] * 8
ACTIVATIONS = ("identity", "gelu", "silu", "tanh")


@pytest.fixture(params=DTYPES)
def dtype(request, monkeypatch) -> torch.dtype:
    if request.param == "bf16":
        kernel.install(monkeypatch)
    return DTYPES[request.param]


def layer(into: int, out: int, activation: str, has_skip: bool) -> TokenLayer:
    return TokenLayer(in_features=into, out_features=out, activation=activation, has_skip=has_skip)


CHAINS = {
    **{
        f"{activation}, block of {inner}": residual_layers(64, inner, 16, activation)
        for activation in ACTIVATIONS
        for inner in (48, 64, 96)
    },
    **{
        f"{activation}, {'with' if has_skip else 'without'} skips": (
            layer(64, 32, activation, has_skip),
            layer(32, 32, activation, has_skip),
            layer(32, 16, activation, has_skip),
        )
        for activation in ACTIVATIONS
        for has_skip in (False, True)
    },
}


def kept_bytes(head: torch.nn.Module, hidden_TD: torch.Tensor) -> int:
    """Storages that autograd keeps of a head; its weights, its input and the rows it gives not included."""
    kept: dict[int, tuple] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rows_TC = head(hidden_TD)
    for tensor in (*head.parameters(), hidden_TD, rows_TC):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("name", CHAINS)
def test_a_head_keeps_exactly_the_tensors_that_are_counted(tmp_path, name, dtype):
    layers, num_tokens = CHAINS[name], 50
    model = M3Model(build(tmp_path, small("xlm-roberta", 1)), [0], multi_vector_layers=layers)
    planned = shape_of(model, multi_vector_layers=layers)
    assert num_parameters(planned) == sum(p.numel() for p in model.parameters())
    hidden_TD = torch.randn(num_tokens, 64, dtype=dtype, requires_grad=True)
    counted = num_tokens * kept_entries(planned) * dtype.itemsize
    assert counted == kept_bytes(Projection(layers).to(dtype), hidden_TD)


def test_one_matrix_keeps_nothing_of_its_own(tmp_path):
    planned = shape(tmp_path, small("xlm-roberta", 1))
    assert kept_entries(planned) == 0
    assert kept_bytes(torch.nn.Linear(64, 16), torch.randn(50, 64, requires_grad=True)) == 0


BLOCKS = [
    (32, 16, "gelu"),
    (64, 4, "gelu"),
    (64, 4, "identity"),
    (256, 16, "identity"),
    (256, 128, "silu"),
    (1024, 16, "gelu"),
    (1024, 64, "tanh"),
]
"""Inner width, width of a row, activation."""


def ratio(tmp_path, family, block, dtype, *, checkpointing=False, freeze=()) -> float:
    """The planned peak of a pass by that of the tensors which were alive."""
    config, (inner, width, activation) = small(family, 2), block
    layers = residual_layers(64, inner, width, activation)
    model = M3Model(build(tmp_path, config, dtype), [0, 1, 2], multi_vector_layers=layers).to(dtype).train()
    freeze_parameters(model, freeze)
    if checkpointing:
        ActivationMemory(model, True, False)
    planned = shape(
        tmp_path,
        config,
        f"model.multi_vector_dim={width}",
        f"model.multi_vector_hidden={inner}",
        f"model.multi_vector_activation={activation}",
        f"model.freeze={json.dumps(freeze)}",
    )
    assert planned.multi_vector_layers == layers
    strategy = strategy_for(dtype, checkpointing=checkpointing)
    peak = activation_bytes(planned, strategy, sum(LENGTHS), 100, mixed_lengths=False)
    return peak / live_peak(model, LENGTHS)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("family", ["xlm-roberta", "modernbert"])
def test_the_planned_peak_of_a_pass_holds_the_head(tmp_path, family, block, dtype, checkpointing):
    assert 0.97 <= ratio(tmp_path, family, block, dtype, checkpointing=checkpointing) <= 1.03


@pytest.mark.parametrize("block", BLOCKS[-2:])
def test_above_a_frozen_encoder_the_head_is_the_peak(tmp_path, block, dtype):
    assert 0.99 <= ratio(tmp_path, "xlm-roberta", block, dtype, freeze=["encoder"]) <= 1.01


def test_its_gradients_and_optimizer_states_are_counted(tmp_path):
    config = small("xlm-roberta", 1)
    block = ["model.multi_vector_hidden=96", "model.multi_vector_dim=16"]
    matrix = shape(tmp_path, config, "model.multi_vector_dim=16")
    with_block = shape(tmp_path, config, *block)
    # 64 → 96 → 64, each with a skip that is a matrix: weights and biases by hand
    more = 2 * 64 * 96 + 96 + 2 * 96 * 64 + 64
    assert head_parameters(with_block) - head_parameters(matrix) == more
    before, after = (state_bytes(each, Strategy(zero_stage=0)) for each in (matrix, with_block))
    assert {name: after[name] - before[name] for name in ("weights", "gradients", "optimizer")} == {
        "weights": 2 * more,
        "gradients": 2 * more,
        "optimizer": 16 * more,
    }


def planned_and_loaded(folder: Path, **fields: Any) -> tuple[ModelShape, M3Model]:
    """The plan's shape, and the model that a run would load."""
    model = load_m3(str(folder), ModelConfig(path=str(folder), missing_heads="init", **fields))
    config = json.loads((folder / "config.json").read_text())
    return shape(folder, config, *(f"model.{name}={value}" for name, value in fields.items())), model


@pytest.mark.parametrize("fields", [{}, {"multi_vector_hidden": 48, "multi_vector_activation": "tanh"}])
def test_what_the_folder_says_is_counted_where_the_recipe_is_silent(tmp_path, fields):
    """A head of 12 numbers a row; exported, it lies in layers or in one file."""
    source = make_tiny_model_folder(tmp_path / "source", max_tokens=128, heads=False)
    asked, model = planned_and_loaded(source, multi_vector_dim=12, **fields)
    for format in ("pylate", "bge-m3"):
        if format == "bge-m3" and fields:
            continue  # it has no place for layers
        export(
            model.state_dict(),
            str(source),
            tmp_path / format,
            format=format,
            settings=ModelConfig(path=str(source), **fields),
        )
        planned, loaded = planned_and_loaded(tmp_path / format)
        assert planned.row_width == 12
        assert planned.multi_vector_layers == asked.multi_vector_layers
        assert num_parameters(planned) == num_parameters(asked) == sum(p.numel() for p in loaded.parameters())
