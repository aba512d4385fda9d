"""ModernBERT in the memory plan: parameters, saved tensors and operations against the model itself."""

import json

import pytest
import torch
from transformers import ModernBertConfig, ModernBertModel

from megam3.cli import main
from megam3.encoders import read_shape
from megam3.model.backbone import encode_packed, load_backbone
from megam3.packed_texts import pack_texts
from megam3.planning.layers import layer_bytes
from megam3.planning.parameters import num_parameters
from megam3.planning.shapes import ModelShape, StepShape, Strategy
from megam3.planning.strategy import forward_flops
from tests.factory import random_token_ids

SIZES = {"vocab_size": 480, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
BIASES = dict.fromkeys(("qkv_bias", "output_bias", "mlp_bias", "norm_bias"), False)
SHAPE = ModelShape(num_layers=1, num_positions=512, layer="gated", **BIASES, **SIZES)


def _config(num_layers: int) -> ModernBertConfig:
    return ModernBertConfig(
        **SIZES,
        num_hidden_layers=num_layers,
        max_position_embeddings=512,
        global_attn_every_n_layers=1,
        **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")},
    )


def _saved_bytes(folder: str, lengths: list[int]) -> int:
    model = load_backbone(folder).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # the tensor stays alive, so that its address is not used again
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    texts = pack_texts(random_token_ids(lengths))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        encode_packed(model, texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1, texts.lengths)
    return sum(size for size, _ in kept.values())


def test_a_layer_saves_exactly_the_tensors_that_are_counted(tmp_path):
    lengths = [100] * 4
    for layers in (2, 4):
        ModernBertModel(_config(layers)).save_pretrained(tmp_path / str(layers))
    # the difference of two depths is the layers alone; the first layer lacks a norm, so both have one
    few, many = (_saved_bytes(str(tmp_path / str(layers)), lengths) for layers in (2, 4))
    counted = layer_bytes(SHAPE, Strategy(precision_bytes=4, on_gpu=False), 400, 100, mixed_lengths=False)
    assert (many - few) / 2 == counted


def test_parameters_are_counted_as_the_model_has_them():
    with torch.device("meta"):
        model = ModernBertModel(_config(3))
    heads = (64 + 1) + 64 * (64 + 1)
    shape = ModelShape(num_layers=3, num_positions=512, layer="gated", **BIASES, **SIZES)
    assert num_parameters(shape) == sum(p.numel() for p in model.parameters()) + heads


def test_operations_are_those_of_the_encoders_own_shape():
    step = StepShape(num_queries=2, num_passages=3, query_tokens=7, passage_tokens=500)
    encoder = {"model_type": "modernbert", "num_hidden_layers": 6, "local_attention": 128, **SIZES}
    own = read_shape(encoder)
    shape = ModelShape(
        num_layers=6, num_positions=512, layer="gated", num_windowed_layers=4, window_reach=64, **SIZES
    )
    assert own.num_windowed_layers == 4
    assert forward_flops(shape, step) == own.forward_flops([7] * 2 + [500] * 3)


@pytest.mark.parametrize("recipe", ["unified", "contrastive"])
def test_the_command_plans_for_it(tmp_path, capsys, recipe):
    base = {
        "model_type": "modernbert",
        "num_hidden_layers": 22,
        "hidden_size": 768,
        "intermediate_size": 1152,
        "num_attention_heads": 12,
        "vocab_size": 256_000,
        "max_position_embeddings": 8192,
    }
    (tmp_path / "config.json").write_text(json.dumps(base))
    assert main(["plan-memory", recipe, f"model.path={tmp_path}", "--gpus", "8"]) == 0
    assert "engine.template=auto: engine.template=zero" in capsys.readouterr().out
