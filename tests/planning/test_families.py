"""Every family that runs packed, in the memory plan: weights against the model on the meta device, what a
layer keeps against autograd to the byte, and the peak of a pass against the tensors that were alive.

In fp32 on CPUs as they are; in bf16 with the tensors that a GPU's kernel keeps (`kernel.py`).
"""

import pytest
import torch
from transformers import AutoModel

from megam3.encoders import FAMILIES, counted_families, served_families
from megam3.engine.activations import ActivationMemory
from megam3.gradcache import _weighted_sum
from megam3.model.backbone import encode_packed, load_encoder_config
from megam3.model.m3 import M3Model, represent
from megam3.packed_texts import pack_texts
from megam3.planning.layers import layer_bytes
from megam3.planning.memory import activation_bytes
from megam3.planning.parameters import head_parameters, num_parameters
from megam3.planning.shapes import Strategy
from tests.factory import random_token_ids
from tests.planning import kernel
from tests.planning.families import PUBLISHED, SMALL, build, published, shape, small
from tests.planning.live_bytes import LivePeak

LENGTHS = [100] * 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(params=DTYPES)
def dtype(request, monkeypatch) -> torch.dtype:
    if request.param == "bf16":
        kernel.install(monkeypatch)
    return DTYPES[request.param]


def strategy_for(dtype: torch.dtype, *, checkpointing: bool = False) -> Strategy:
    """bf16 is planned as on a GPU."""
    return Strategy(
        precision_bytes=dtype.itemsize, on_gpu=dtype is torch.bfloat16, checkpointing=checkpointing
    )


def test_every_family_that_runs_packed_is_counted():
    assert counted_families() == served_families()
    assert set(SMALL) == set(served_families())
    assert {name for name, family in FAMILIES.items() if family.layer is None} == {"data2vec-text", "xmod"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_those_of_the_model(tmp_path, name):
    planned = shape(tmp_path, published(name))
    config = load_encoder_config(str(tmp_path))
    options = {"add_pooling_layer": False} if FAMILIES[config.model_type].has_pooler else {}
    with torch.device("meta"):
        encoder = AutoModel.from_config(config, **options)
    counted = num_parameters(planned) - head_parameters(planned)
    assert counted == sum(parameter.numel() for parameter in encoder.parameters())


@pytest.mark.parametrize("field", ["attention_bias", "mlp_bias", "norm_bias"])
@pytest.mark.parametrize("family", ["llama", "eurobert", "qwen3", "gemma3_text", "modernbert"])
def test_biases_are_counted_where_a_config_asks_for_them(tmp_path, family, field):
    planned = shape(tmp_path, small(family, 3, **{field: True}))
    model = build(tmp_path, small(family, 3, **{field: True}))
    counted = num_parameters(planned) - head_parameters(planned)
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def saved_bytes(model, lengths: list[int]) -> int:
    """Storages that autograd keeps for one backward pass, weights not included."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # the tensor stays alive, so that its address is not used again
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    texts = pack_texts(random_token_ids(lengths, vocab_size=290))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encode_packed(model, texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1, texts.lengths)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("family", SMALL)
def test_a_layer_keeps_exactly_the_tensors_that_are_counted(tmp_path, family, dtype):
    # the difference of two depths is one layer; the first of ModernBERT lacks a norm, so both have one
    few, many = (saved_bytes(build(tmp_path, small(family, n), dtype), LENGTHS) for n in (2, 3))
    planned = shape(tmp_path, small(family, 1))
    counted = layer_bytes(planned, strategy_for(dtype), sum(LENGTHS), 100, mixed_lengths=False)
    if dtype is torch.bfloat16 and planned.layer in ("post_norm", "gated"):
        # a CPU keeps mean and deviation of both layer norms in bf16, a GPU in fp32
        counted -= sum(LENGTHS) * 2 * 2 * 2
    assert many - few == counted


@pytest.mark.parametrize("family", ["llama", "modernbert", "qwen3", "xlm-roberta"])
def test_texts_of_several_lengths_keep_their_outputs_twice_on_a_cpu(tmp_path, family):
    lengths = [100, 50, 150, 100]
    few, many = (saved_bytes(build(tmp_path, small(family, n)), lengths) for n in (2, 3))
    planned = shape(tmp_path, small(family, 1))
    assert many - few == layer_bytes(planned, strategy_for(torch.float32), sum(lengths), 150)


def live_peak(model: M3Model, lengths: list[int]) -> int:
    """Most bytes of tensors during a chunk's pass with its graph; gradients of weights are there before."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    texts = pack_texts(random_token_ids(lengths, vocab_size=290))
    if model.expansion_head is None:
        texts = texts.with_pairs((0, 1, 2))
    with LivePeak() as live:
        representations = represent(model, texts)
        gradients = [torch.ones_like(values) for values in representations.floats()]
        _weighted_sum(representations, gradients).backward()
    # gradients of the representations are counted with the representations
    return live.peak_bytes - sum(values.nbytes for values in gradients)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", SMALL)
def test_the_planned_peak_of_a_pass_is_that_of_its_tensors(tmp_path, family, dtype, checkpointing):
    config = small(family, 4)
    model = M3Model(build(tmp_path, config, dtype), [0, 1, 2]).to(dtype).train()
    if checkpointing:
        ActivationMemory(model, True, False)
    planned = activation_bytes(
        shape(tmp_path, config),
        strategy_for(dtype, checkpointing=checkpointing),
        sum(LENGTHS),
        100,
        mixed_lengths=False,
    )
    assert 0.97 <= planned / live_peak(model, LENGTHS) <= 1.07
