"""Families and sizes of encoders, read from config.json alone: directions, windows, what cannot run packed,
and the arithmetic of a forward pass against a counted one."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megam3.encoders import (
    EncoderShape,
    find_direction_problem,
    find_packing_problem,
    is_causal,
    read_shape,
    served_families,
    window_reaches,
)
from megam3.model.backbone import build_backbone
from tests.model.test_attention import READINGS, packed_hidden, tiny

MODERNBERT = {
    "model_type": "modernbert",
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
}
"""Sizes of answerdotai/ModernBERT-base, as its config.json writes them."""


def gemma3(**values):
    sizes = {"hidden_size": 768, "num_attention_heads": 3, "num_hidden_layers": 24, "sliding_window": 512}
    return {"model_type": "gemma3_text", **sizes, **values}


@pytest.mark.parametrize(
    ("encoder", "causal"),
    [
        ({"model_type": "qwen3"}, True),
        ({"model_type": "qwen3", "is_causal": False}, False),
        ({"model_type": "gemma3_text"}, True),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, False),
        ({"model_type": "eurobert", "is_causal": True}, False),
        ({"model_type": "xlm-roberta"}, False),
    ],
)
def test_the_direction_of_a_config(encoder, causal):
    assert is_causal(encoder) is causal


def test_windows_as_each_family_writes_them():
    assert window_reaches(MODERNBERT)[:4] == [None, 64, 64, None]
    assert window_reaches(gemma3())[4:6] == [511, None]
    assert window_reaches(gemma3(use_bidirectional_attention=True))[4:6] == [256, None]
    assert window_reaches(gemma3(sliding_window=None)) == [None] * 24
    mistral = {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 4096}
    assert window_reaches(mistral) == [4095, 4095]
    qwen = {"model_type": "qwen3", "num_hidden_layers": 3, "sliding_window": 9, "max_window_layers": 2}
    assert window_reaches(qwen) == [None, None, None]
    assert window_reaches({**qwen, "use_sliding_window": True}) == [None, None, 8]


@pytest.mark.parametrize(("family", "attention"), READINGS)
def test_windows_are_those_of_the_loaded_config(family, attention):
    """The layers of the real class, against what the torch-free reader says of the same config.json."""
    config = tiny(family, attention=attention)
    encoder = build_backbone(config)
    windows = [m.sliding_window for m in encoder.modules() if hasattr(m, "sliding_window")]
    if family == "mistral":
        windows = [config.sliding_window] * config.num_hidden_layers
    expected = [None if window is None else window - 1 for window in windows] or [None] * 3
    assert window_reaches({**config.to_dict(), "model_type": family}) == expected


@pytest.mark.parametrize("length", [1, 2, 7, 40])
@pytest.mark.parametrize("causal", [False, True])
def test_visible_pairs_are_those_of_the_mask(length, causal):
    shape = EncoderShape(
        num_layers=1,
        hidden_size=8,
        intermediate_size=8,
        window_reach=5,
        is_causal=causal,
        num_windowed_layers=1,
    )
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    assert shape.visible_pairs(length) == int(visible.sum())
    assert shape.visible_pairs(length, windowed=True) == int((visible & (distance.abs() <= 5)).sum())


@pytest.mark.parametrize("family", [f for f in served_families() if f != "electra"])
def test_projections_and_feed_forward_are_those_torch_counts(family):
    """torch's counter sees matrix products, not the fused attention kernel, whose pairs are counted above;
    Electra alone projects its embeddings too."""
    config = tiny(family)
    encoder = build_backbone(config).eval()
    with FlopCounterMode(display=False) as counter:
        packed_hidden(encoder, [list(range(4, 104))])
    shape = read_shape({**config.to_dict(), "model_type": family})
    num_global = shape.num_layers - shape.num_windowed_layers
    pairs = num_global * shape.visible_pairs(100)
    pairs += shape.num_windowed_layers * shape.visible_pairs(100, windowed=True)
    assert shape.query_width == 32
    assert counter.get_total_flops() == shape.forward_flops([100]) - 4 * 32 * pairs


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic', which depend on the longest text"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "'longrope', which depend on the longest text"),
        ({"attn_logit_softcapping": 50.0}, "caps its attention scores"),
    ],
)
def test_what_cannot_run_packed_is_refused_by_name(values, words):
    problem = find_packing_problem(gemma3(**values), "models/g")
    assert problem is not None
    assert words in str(problem)


def test_windows_of_a_family_made_left_to_right_stay_so():
    encoder = {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 4096, "is_causal": False}
    problem = find_packing_problem(encoder, "models/m")
    assert problem is not None
    assert "its family reads left to right only; set model.attention: causal" in str(problem)


def test_an_encoder_of_both_directions_reads_no_other():
    problem = find_direction_problem("xlm-roberta", "causal", "models/x")
    assert problem is not None
    assert "model.attention" in str(problem)
    assert "reads in both directions only; leave it out" in str(problem)
    assert find_direction_problem("xlm-roberta", "bidirectional", "models/x") is None
    assert find_direction_problem("qwen3", "causal", "models/q") is None
