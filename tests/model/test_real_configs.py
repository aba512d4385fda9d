"""The configs that people start from, with their published thetas, windows, patterns and head groups: only
width, layers and vocabulary are cut. Packed against padded, outputs and every gradient, in float64.

Where the values are from: ModernBERT's, EuroBERT's, Qwen 3's and Gemma 3's fields from the defaults of their
config classes in transformers; mmBERT's thetas and `sans_pos` from copies of its config.json in other
readers; head groups from parameter counts (EuroBERT-610m: 26 layers of 460 M without embeddings are 18 heads
of 64 over 6, 1152 and 4096 wide; EmbeddingGemma: 24 layers of 101 M are 3 heads of 256 over 1, 768 and 1152).

Read from a config.json on disk, as a downloaded folder has it, so that old names of fields are read too.
"""

import json

import pytest
import torch
from transformers import AutoModel, EuroBertConfig, Gemma3TextConfig, ModernBertConfig, Qwen3Config

from megam3.encoders import read_encoder_config, read_shape
from megam3.model.backbone import build_backbone, load_encoder_config
from tests.factory import random_token_ids
from tests.model.test_attention import norms_in_own_dtype, packed_hidden, padded_hidden

IDS = {"vocab_size": 300, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "initializer_range": 0.2}
CUT = {**IDS, "num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
"""What a test cuts down; everything below is as published."""
HALF = {**CUT, "num_key_value_heads": 2, "head_dim": 16}
QUARTER = {**HALF, "num_key_value_heads": 1}
THIRD = {**HALF, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
MODERNBERT = {
    "model_type": "modernbert",
    "architectures": ["ModernBertForMaskedLM"],
    "max_position_embeddings": 8192,
    "global_attn_every_n_layers": 3,
    "local_attention": 128,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "norm_eps": 1e-5,
    "position_embedding_type": "absolute",
}
CONFIGS = {
    "answerdotai/ModernBERT-base": {**MODERNBERT, **CUT},
    # both thetas at 160000, and a name for its positions that transformers does not read
    "jhu-clsp/mmBERT-base": {
        **MODERNBERT,
        **CUT,
        "local_rope_theta": 160000.0,
        "position_embedding_type": "sans_pos",
    },
    "EuroBERT/EuroBERT-610m": {
        "model_type": "eurobert",
        "auto_map": {"AutoModel": "modeling_eurobert.EuroBertModel"},
        "max_position_embeddings": 8192,
        "rope_theta": 250000,
        "rms_norm_eps": 1e-5,
        **THIRD,
    },
    "Qwen/Qwen3-Embedding-0.6B": {
        "model_type": "qwen3",
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "sliding_window": None,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        **HALF,
    },
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama",
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rms_norm_eps": 1e-5,
        **QUARTER,
    },
    "google/embeddinggemma-300m": {
        "model_type": "gemma3_text",
        "max_position_embeddings": 2048,
        "use_bidirectional_attention": True,
        "sliding_window": 512,
        "_sliding_window_pattern": 6,
        "layer_types": [*["sliding_attention"] * 5, "full_attention"],
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        **THIRD,
        "num_hidden_layers": 6,
    },
    "intfloat/e5-mistral-7b-instruct": {
        "model_type": "mistral",
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        **QUARTER,
    },
}
LENGTHS = (560, 30, 1, 560)


def twins(folder, config, attention):
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_encoder_config(str(folder), attention)
    torch.manual_seed(0)
    packed = norms_in_own_dtype(build_backbone(loaded, dtype=torch.float64).eval())
    padded = AutoModel.from_config(loaded, attn_implementation="sdpa", dtype=torch.float64).eval()
    assert not padded.load_state_dict(packed.state_dict(), strict=False).unexpected_keys
    return packed, norms_in_own_dtype(padded)


def compare(packed, padded, lengths):
    token_ids = random_token_ids(lengths)
    expected, got = padded_hidden(padded, token_ids), packed_hidden(packed, token_ids)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (expected * direction).mean().backward()
    (got * direction).mean().backward()
    wanted = {name: parameter.grad for name, parameter in padded.named_parameters()}
    for name, parameter in packed.named_parameters():
        if wanted[name] is not None:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", [None, "bidirectional"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_published_config_runs_packed_as_padded(tmp_path, name, attention):
    config = dict(CONFIGS[name])
    if config["model_type"] == "mistral" and attention:
        config["sliding_window"] = None  # its windows are refused in both directions
    compare(*twins(tmp_path, config, attention), LENGTHS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("answerdotai/ModernBERT-base", 8192),
        ("jhu-clsp/mmBERT-base", 8192),
        ("EuroBERT/EuroBERT-610m", 8192),
        ("google/embeddinggemma-300m", 2048),
        ("intfloat/e5-mistral-7b-instruct", 5000),
    ],
)
def test_at_full_length(tmp_path, name, length):
    """Mistral's window begins to cut after 4096 tokens."""
    config = {**CONFIGS[name], "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][-2:]
    if "num_key_value_heads" in config:
        config["num_key_value_heads"] = 1
    compare(*twins(tmp_path, config, None), (length, 300))


@pytest.mark.parametrize(
    ("name", "layers", "windowed", "reach", "key_share"),
    [
        ("answerdotai/ModernBERT-base", 4, 2, 64, 1.0),
        ("jhu-clsp/mmBERT-base", 4, 2, 64, 1.0),
        ("EuroBERT/EuroBERT-610m", 4, 0, 0, 1 / 3),
        ("Qwen/Qwen3-Embedding-0.6B", 4, 0, 0, 0.5),
        ("google/embeddinggemma-300m", 6, 5, 256, 1 / 3),
        ("intfloat/e5-mistral-7b-instruct", 4, 4, 4095, 0.25),
    ],
)
def test_sizes_are_read_from_the_published_fields(tmp_path, name, layers, windowed, reach, key_share):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    shape = read_shape(read_encoder_config(str(tmp_path)))
    assert (shape.num_layers, shape.num_windowed_layers, shape.window_reach) == (layers, windowed, reach)
    assert shape.key_width == round(key_share * shape.query_width)


def test_published_values_are_the_defaults_of_their_config_classes(tmp_path):
    """What transformers fills in for a config.json that says nothing."""
    plain = {"answerdotai/ModernBERT-base": ModernBertConfig(), "EuroBERT/EuroBERT-610m": EuroBertConfig()}
    plain |= {"Qwen/Qwen3-Embedding-0.6B": Qwen3Config(), "google/embeddinggemma-300m": Gemma3TextConfig()}
    for name, default in plain.items():
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
        ours, theirs = load_encoder_config(str(tmp_path)).to_dict(), default.to_dict()
        same = {"rms_norm_eps", "norm_eps", "local_attention", "query_pre_attn_scalar", "use_sliding_window"}
        for field in same & ours.keys() & theirs.keys():
            assert ours[field] == theirs[field], (name, field)
        if name in ("answerdotai/ModernBERT-base", "google/embeddinggemma-300m"):
            thetas = [
                {kind: part["rope_theta"] for kind, part in each["rope_parameters"].items()}
                for each in (ours, theirs)
            ]
            assert thetas[0] == thetas[1], name
    assert ModernBertConfig().layer_types[:4] == [
        "full_attention",
        "sliding_attention",
        "sliding_attention",
        "full_attention",
    ]
    gemma = Gemma3TextConfig(num_hidden_layers=6).layer_types
    assert gemma == CONFIGS["google/embeddinggemma-300m"]["layer_types"]


def test_thetas_of_both_kinds_of_layers_reach_the_model(tmp_path):
    """Guards the parity: both sides would read a wrong theta alike."""
    for name, local in (("answerdotai/ModernBERT-base", 10000.0), ("jhu-clsp/mmBERT-base", 160000.0)):
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
        parameters = load_encoder_config(str(tmp_path)).rope_parameters
        assert parameters["full_attention"]["rope_theta"] == 160000.0
        assert parameters["sliding_attention"]["rope_theta"] == local
