"""Which way attention takes on a device with the varlen kernel, how many launches it costs, and that both
ways are equal there."""

import pytest
import torch

from megam3.model.attention import choose_attention, report_attention
from megam3.model.backbone import build_backbone
from tests.factory import random_token_ids
from tests.gpu.varlen_stand_in import install
from tests.model.test_attention import LENGTHS, READINGS, packed_hidden, padded_hidden, tiny, twins

CUDA, BF16 = torch.device("cuda"), torch.bfloat16


def test_a_cpu_goes_by_runs():
    choice = choose_attention(tiny("xlm-roberta"), torch.device("cpu"), BF16, True)
    assert (choice.kernel, choice.obstacle) == ("runs", "a cpu device without varlen kernel")


@pytest.mark.parametrize(
    ("dropout", "dtype", "is_training", "obstacle", "remedy"),
    [
        (0.1, BF16, True, "attention dropout of 0.1", "model.attention_dropout=0.0"),
        (0.0, torch.float32, True, "float32", "engine.precision=bf16"),
        (0.1, BF16, False, "", ""),
        (0.0, torch.float16, True, "", ""),
    ],
)
def test_the_slow_way_says_why_and_what_helps(monkeypatch, dropout, dtype, is_training, obstacle, remedy):
    install(monkeypatch)
    choice = choose_attention(tiny("xlm-roberta", dropout=dropout), CUDA, dtype, is_training)
    assert choice.kernel == ("runs" if obstacle else "varlen")
    assert obstacle in choice.obstacle
    assert remedy in choice.remedy


def test_heads_of_odd_width_go_by_runs(monkeypatch):
    install(monkeypatch)
    config = tiny("xlm-roberta")
    config.num_attention_heads = 16
    assert "heads 2 wide" in choose_attention(config, CUDA, BF16, True).obstacle


def test_old_cards_go_by_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_attention(tiny("xlm-roberta"), CUDA, BF16, True).kernel == "runs"


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_launches_are_one_a_layer_or_one_a_layer_and_length(monkeypatch, dropout):
    stand_in = install(monkeypatch, any_dtype=True)
    encoder = build_backbone(tiny("xlm-roberta", dropout=dropout)).train()
    choice = choose_attention(encoder.config, torch.device("cpu"), encoder.dtype, True)
    plain = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "megam3.model.attention.scaled_dot_product_attention",
        lambda *args, **options: plain.append(1) or sdpa(*args, **options),
    )
    packed_hidden(encoder, random_token_ids(LENGTHS))
    layers, distinct = 3, len(set(LENGTHS))
    assert (stand_in.launches, len(plain)) == ((0, layers * distinct) if dropout else (layers, 0))
    assert choice.launches(layers, LENGTHS) == stand_in.launches + len(plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("family", "attention"), READINGS)
def test_the_varlen_way_equals_the_padded_model(monkeypatch, family, attention, dtype):
    stand_in = install(monkeypatch, any_dtype=True)
    packed, padded = twins(family, dtype, attention)
    token_ids = random_token_ids(LENGTHS)
    ours, theirs = packed_hidden(packed, token_ids), padded_hidden(padded, token_ids)
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(ours, theirs, **tolerance)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    gradients = dict(padded.named_parameters())
    for name, parameter in packed.named_parameters():
        # twins share no pooler; the key bias moves no softmax, and its gradient is rounding
        if gradients[name].grad is not None and not name.endswith("key.bias"):
            torch.testing.assert_close(
                parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-3 if dtype is torch.float32 else 1e-8
            )
    assert stand_in.launches == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_way_follows_the_queries(monkeypatch, dtype):
    """fp32 weights under bf16 autocast: the queries are bf16. Texts out of order show a wrong order at
    once."""
    stand_in = install(monkeypatch)
    packed, padded = twins("xlm-roberta", torch.float32)
    token_ids = random_token_ids(LENGTHS)
    exact = padded_hidden(padded, token_ids)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (
            packed_hidden(packed.to(dtype), token_ids).float(),
            padded_hidden(padded, token_ids).float(),
        )
    assert stand_in.launches == 3

    def error(hidden):
        return ((hidden - exact).norm() / exact.norm()).item()

    assert error(ours) < 1.5 * error(theirs), "rounding of bf16, as the padded model has under autocast"
    assert error(theirs) < 0.05


@pytest.mark.parametrize(
    ("dropout", "is_slow", "words"),
    [(0.0, False, "varlen kernel, 3 launches"), (0.1, True, "set model.attention_dropout=0.0")],
)
def test_a_run_says_how_it_attends_and_warns_of_the_slow_way(monkeypatch, dropout, is_slow, words):
    encoder = build_backbone(tiny("xlm-roberta", dropout=dropout), dtype=BF16)
    assert not report_attention(encoder, torch.device("cpu")).is_slow, "there is no faster way there"
    install(monkeypatch)
    report = report_attention(torch.nn.Sequential(encoder), CUDA)
    assert report.is_slow == is_slow
    assert words in report.line
