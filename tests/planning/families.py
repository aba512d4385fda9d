"""One encoder of every family for the tests of the memory plan: sizes as published for parameters, cut down
for what runs."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from megam3.config.load import load_config
from megam3.model.backbone import build_backbone, load_encoder_config
from megam3.planning.recipe import read_model_shape
from megam3.planning.shapes import ModelShape
from tests.model.test_real_configs import CONFIGS, CUT, HALF

_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_TABLE = {**CUT, **_BERT, "max_position_embeddings": 514, "type_vocab_size": 1}

SMALL: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", **_TABLE},
    "camembert": {"model_type": "camembert", **_TABLE},
    "electra": {"model_type": "electra", **_TABLE, "embedding_size": 32},
    "eurobert": CONFIGS["EuroBERT/EuroBERT-610m"],
    "gemma3_text": CONFIGS["google/embeddinggemma-300m"],
    "llama": CONFIGS["meta-llama/Llama-3.2-1B"],
    "mistral": CONFIGS["intfloat/e5-mistral-7b-instruct"],
    "modernbert": CONFIGS["answerdotai/ModernBERT-base"],
    "qwen2": {"model_type": "qwen2", "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, **HALF},
    "qwen3": CONFIGS["Qwen/Qwen3-Embedding-0.6B"],
    "roberta": {"model_type": "roberta", **_TABLE},
    "xlm-roberta": {"model_type": "xlm-roberta", **_TABLE},
    "xlm-roberta-xl": {"model_type": "xlm-roberta-xl", **_TABLE},
}
"""By model_type."""

PUBLISHED = {
    "google-bert/bert-base-multilingual-cased": ("bert", 12, 768, 3072, 12, 119_547, {"type_vocab_size": 2}),
    "google/electra-small-discriminator": (
        "electra",
        12,
        256,
        1024,
        4,
        30_522,
        {"embedding_size": 128, "type_vocab_size": 2},
    ),
    "EuroBERT/EuroBERT-610m": (
        "eurobert",
        26,
        1152,
        4096,
        18,
        128_256,
        {"num_key_value_heads": 6, "head_dim": 64},
    ),
    "google/embeddinggemma-300m": (
        "gemma3_text",
        24,
        768,
        1152,
        3,
        262_144,
        {"num_key_value_heads": 1, "head_dim": 256},
    ),
    "meta-llama/Llama-3.2-1B": (
        "llama",
        16,
        2048,
        8192,
        32,
        128_256,
        {"num_key_value_heads": 8, "head_dim": 64},
    ),
    "intfloat/e5-mistral-7b-instruct": (
        "mistral",
        32,
        4096,
        14_336,
        32,
        32_000,
        {"num_key_value_heads": 8, "head_dim": 128},
    ),
    "answerdotai/ModernBERT-base": ("modernbert", 22, 768, 1152, 12, 50_368, {}),
    "jhu-clsp/mmBERT-base": ("modernbert", 22, 768, 1152, 12, 256_000, {}),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 24, 896, 4864, 14, 151_936, {"num_key_value_heads": 2, "head_dim": 64}),
    "Qwen/Qwen3-Embedding-0.6B": (
        "qwen3",
        28,
        1024,
        3072,
        16,
        151_669,
        {"num_key_value_heads": 8, "head_dim": 128},
    ),
    "BAAI/bge-m3": ("xlm-roberta", 24, 1024, 4096, 16, 250_002, {"max_position_embeddings": 8194}),
    "facebook/xlm-roberta-xl": ("xlm-roberta-xl", 36, 2560, 10_240, 32, 250_880, {}),
}
"""model_type, layers, width, inner width, heads, vocabulary, and what else decides the number of weights."""


def published(name: str) -> dict[str, Any]:
    """The config of a published encoder, as far as sizes go."""
    family, layers, hidden, inner, heads, vocabulary, others = PUBLISHED[name]
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
    }
    return {**_one_kind_of_layer(SMALL[family], layers), **sizes, **others}


def small(family: str, num_layers: int, **changes: Any) -> dict[str, Any]:
    """A cut-down config whose layers all save the same."""
    return {**_one_kind_of_layer(SMALL[family], num_layers), **changes}


def _one_kind_of_layer(config: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Without windows, which copy their neighbours on a CPU, and not on a GPU."""
    changed = {**config, "num_hidden_layers": num_layers}
    if "layer_types" in changed:
        changed["layer_types"] = ["full_attention"] * num_layers
    if changed["model_type"] == "modernbert":
        changed["global_attn_every_n_layers"] = 1
    if changed["model_type"] == "mistral":
        changed["sliding_window"] = None
    return changed


def build(folder: Path, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The encoder of a config, packed, at random, in training."""
    (folder / "config.json").write_text(json.dumps(config))
    return build_backbone(load_encoder_config(str(folder)), dtype=dtype).train()


def shape(folder: Path, config: dict[str, Any], *overrides: str) -> ModelShape:
    """What the plan reads of the same config."""
    (folder / "config.json").write_text(json.dumps(config))
    own = [f"model.path={folder}", "model.hidden_dropout=null", "model.attention_dropout=null"]
    return read_model_shape(load_config("unified", [*own, *overrides]))
