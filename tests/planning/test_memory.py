"""The memory arithmetic against hand counts, against what autograd really saves, and against DeepSpeed's
estimators."""

from dataclasses import replace

import pytest
import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import XLMRobertaConfig, XLMRobertaModel

from megam3.config.schema import ModelConfig
from megam3.engine.activations import ActivationMemory
from megam3.loss.limits import loss_needs_tiles
from megam3.model.m3 import M3Model, represent
from megam3.model.pretrained import load_m3
from megam3.packed_texts import pack_texts
from megam3.planning.layers import layer_bytes
from megam3.planning.memory import (
    activation_bytes,
    largest_chunk,
    plan_memory,
    remedies,
    state_bytes,
)
from megam3.planning.parameters import num_parameters
from megam3.planning.scores import loss_bytes
from megam3.planning.shapes import ModelShape, StepShape, Strategy
from tests.factory import make_tiny_model_folder, random_token_ids

BGE_M3 = ModelShape(
    num_layers=24,
    hidden_size=1024,
    intermediate_size=4096,
    num_attention_heads=16,
    vocab_size=250_002,
    num_positions=8194,
)
STEP = StepShape(num_queries=4, num_passages=32, query_tokens=512, passage_tokens=8192)
GIB = 1 << 30


def _model(folder, *, num_layers: int, dropout: float) -> M3Model:
    make_tiny_model_folder(folder, hidden_size=64, num_layers=num_layers, num_heads=4, dropout=dropout)
    return load_m3(str(folder), ModelConfig(path=str(folder))).train()


def _saved_bytes(model: M3Model, lengths: list[int]) -> int:
    """Storages that autograd keeps for one backward pass, weights not included."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # the tensor stays alive, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        representations = represent(model, pack_texts(random_token_ids(lengths)))
    assert representations.num_texts == len(lengths)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    ("lengths", "dropout"), [([100] * 4, 0.0), ([100, 150, 120, 160], 0.0), ([100] * 4, 0.1)]
)
def test_a_layer_saves_exactly_the_tensors_that_are_counted(tmp_path, lengths, dropout):
    # the difference of two depths is the layers alone
    saved = [_saved_bytes(_model(tmp_path / str(n), num_layers=n, dropout=dropout), lengths) for n in (1, 3)]
    shape = ModelShape(
        num_layers=1,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        vocab_size=480,
        num_positions=514,
        hidden_dropout=dropout,
        attention_dropout=dropout,
    )
    counted = layer_bytes(
        shape, Strategy(precision_bytes=4, on_gpu=False), sum(lengths), max(lengths), len(set(lengths)) > 1
    )
    assert (saved[1] - saved[0]) / 2 == counted


def test_a_checkpointed_layer_saves_its_input(tmp_path):
    models = [_model(tmp_path / str(n), num_layers=n, dropout=0.0) for n in (1, 3)]
    for model in models:
        ActivationMemory(model, True, False)
    saved = [_saved_bytes(model, [100] * 4) for model in models]
    assert (saved[1] - saved[0]) / 2 == 400 * 64 * 4


def test_parameters_are_counted_as_the_model_has_them(tmp_path):
    model = _model(tmp_path, num_layers=2, dropout=0.0)
    config = model.encoder.config
    shape = ModelShape(
        num_layers=2,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        vocab_size=config.vocab_size,
        num_positions=config.max_position_embeddings,
    )
    assert num_parameters(shape) == sum(p.numel() for p in model.parameters())
    sizes = {
        "vocab_size": 250_002,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    }
    with torch.device("meta"):
        encoder = XLMRobertaModel(
            XLMRobertaConfig(**sizes, max_position_embeddings=8194, type_vocab_size=1),
            add_pooling_layer=False,
        )
    assert num_parameters(BGE_M3) == sum(p.numel() for p in encoder.parameters()) + 1025 + 1024 * 1025


def test_one_layer_by_hand():
    # 10 tokens of width 4, inner 16, 2 heads, bf16 on a GPU: (8·4 + 2·16) · 2 + 16 (norms' statistics) + 2 ·
    # 4 (log-sum-exp) a token
    shape = ModelShape(
        num_layers=1,
        hidden_size=4,
        intermediate_size=16,
        num_attention_heads=2,
        vocab_size=100,
        num_positions=10,
    )
    assert layer_bytes(shape, Strategy(), 10, 10) == 10 * (64 * 2 + 16 + 8)
    assert layer_bytes(replace(shape, hidden_dropout=0.1), Strategy(), 10, 10) == 10 * (64 * 2 + 16 + 8 + 8)


def test_model_states_equal_deepspeeds_estimators_but_for_gradients_in_fp32():
    count, ranks = num_parameters(BGE_M3), 8
    states = state_bytes(BGE_M3, Strategy(zero_stage=2, world_size=ranks))
    _, wanted = estimate_zero2_model_states_mem_needs(count, num_gpus_per_node=ranks, cpu_offload=False)
    # it counts gradients in 16 bits; they are summed in 32
    assert sum(states.values()) - 2 * count // ranks == pytest.approx(wanted, rel=1e-6)
    states = state_bytes(BGE_M3, Strategy(zero_stage=3, world_size=ranks, live_parameters=1))
    _, wanted, largest_layer = estimate_zero3_model_states_mem_needs(
        count, 0, num_gpus_per_node=ranks, cpu_offload=False
    )
    assert largest_layer == 0
    # it leaves out one of the two copies, weights or gradients; both are partitioned and both are there
    assert sum(states.values()) - 4 * count // ranks == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    ("strategy", "per_parameter"),
    [
        (Strategy(zero_stage=0, precision_bytes=4), 4 + 4 + 8),
        (Strategy(zero_stage=0), 2 + 2 + 4 + 4 + 8),
        (Strategy(zero_stage=1, world_size=4), 2 + 2 + 16 / 4),
        (Strategy(zero_stage=2, world_size=4), 2 + 4 / 4 + 16 / 4),
        (
            Strategy(
                zero_stage=3, world_size=4, optimizer_offload=True, parameter_offload=True, live_parameters=1
            ),
            4 / 4,
        ),
    ],
)
def test_bytes_per_parameter_by_stage(strategy, per_parameter):
    assert sum(state_bytes(BGE_M3, strategy).values()) == pytest.approx(
        per_parameter * num_parameters(BGE_M3), rel=1e-6
    )


def test_memory_grows_with_the_work_and_shrinks_with_every_saving():
    base = Strategy(zero_stage=1, world_size=8, bucket_elements=1000)
    total = plan_memory(BGE_M3, base, replace(STEP, chunk_tokens=16_384)).total_bytes
    for larger in (
        {"chunk_tokens": 32_768},
        {"chunk_tokens": None},
        {"num_passages": 64, "chunk_tokens": 16_384},
    ):
        assert plan_memory(BGE_M3, base, replace(STEP, **larger)).total_bytes > total
    saving = base
    for change in (
        {"checkpointing": True},
        {"activation_offload": True},
        {"zero_stage": 2},
        {"zero_stage": 3, "live_parameters": 10**8},
    ):
        before, saving = saving, replace(saving, **change)
        whole = [plan_memory(BGE_M3, each, STEP).total_bytes for each in (before, saving)]
        assert whole[1] < whole[0], change
    assert activation_bytes(BGE_M3, base, 16_384, 8192) > 3 * activation_bytes(
        BGE_M3, replace(base, checkpointing=True), 16_384, 8192
    )


def test_the_largest_chunk_fits_and_one_token_more_does_not():
    strategy, limit = Strategy(zero_stage=1, world_size=8, checkpointing=True), 20 * GIB
    chunk = largest_chunk(BGE_M3, strategy, STEP, limit)
    assert chunk is not None
    assert 8192 <= chunk < STEP.num_tokens
    assert plan_memory(BGE_M3, strategy, replace(STEP, chunk_tokens=chunk)).total_bytes <= limit
    assert plan_memory(BGE_M3, strategy, replace(STEP, chunk_tokens=chunk + 1)).total_bytes > limit
    assert largest_chunk(BGE_M3, strategy, STEP, GIB) is None


def test_remedies_name_the_cheapest_settings_that_fit():
    plain = Strategy(zero_stage=1, world_size=8)
    long = replace(STEP, num_queries=1, num_passages=8)
    assert largest_chunk(BGE_M3, plain, long, 8 * GIB) is None
    names = [name for name, _ in remedies(BGE_M3, plain, long, 8 * GIB)]
    assert names == ["engine.activation_checkpointing=true"]
    assert remedies(BGE_M3, plain, long, GIB // 4) == []


def test_a_loss_in_tiles_holds_the_winners_of_one_tile():
    # 4 Mi query rows of all ranks × 288 passages: more winners than are held whole
    step = StepShape(
        num_queries=1024, num_passages=288, query_tokens=512, passage_tokens=64, chunk_tokens=65_536
    )
    strategy = Strategy(zero_stage=3, world_size=8)
    whole, tiled = (
        sum(loss_bytes(BGE_M3, strategy, replace(step, loss_tiles=mode)).values())
        for mode in ("never", "auto")
    )
    gathered = 1024 * 512 * 8 * 1024 * (2 + 8)
    assert whole - gathered > 4 * 1024 * 512 * 8 * 288
    assert tiled - gathered < GIB
    assert loss_needs_tiles(1024, 288 * 8, 1024 * 512 * 8, 288)
    assert not loss_needs_tiles(1024, 288 * 8, 0, 288)
