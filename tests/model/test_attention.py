"""Packed encoders against the same weights run padded by transformers: outputs and gradients, for every
family that is served."""

import copy
import functools

import pytest
import torch
from transformers import AutoConfig, AutoModel

from megam3.encoders import FAMILIES, served_families
from megam3.model.attention import equal_length_runs, packed_attention
from megam3.model.backbone import build_backbone, encode_packed, turn_config
from megam3.packed_texts import pack_texts
from tests.factory import random_token_ids

# repeated, sorted, unsorted and single-token texts; ModernBERT's window of 8 reaches 4 tokens to each side,
# and 300 > 4 blocks of 64
LENGTHS = (5, 17, 3, 17, 1, 40, 5, 300, 2, 17)


READINGS = [(family, None) for family in served_families()] + [
    (family, "bidirectional") for family in served_families() if FAMILIES[family].direction_field
]
"""Every served family as its config reads, and those made left to right also in both directions."""


def tiny(family, *, dropout=0.0, attention=None):
    names = (
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "attention_dropout",
        "mlp_dropout",
        "embedding_dropout",
    )
    config = AutoConfig.for_model(
        family,
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=400,
        type_vocab_size=2,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        cls_token_id=0,
        sep_token_id=2,
        initializer_range=0.3,
    )
    if family == "electra":
        config.embedding_size = 16
    if FAMILIES[family].is_rotary and family != "modernbert":
        config.num_key_value_heads, config.head_dim = 2, 8
    if family in ("gemma3_text", "mistral"):
        # Mistral lists no kinds of layers: all have the window, and none may when read in both directions
        config.sliding_window = None if family == "mistral" and attention == "bidirectional" else 8
    if family == "gemma3_text":
        config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
        config.query_pre_attn_scalar = 8
    if family == "modernbert":
        config.local_attention = 8
        config.layer_types = ["full_attention", "sliding_attention", "sliding_attention"]
    for name in names:
        if hasattr(config, name):
            setattr(config, name, dropout)
    return config if attention is None else turn_config(config, attention, family)


def padded_hidden(encoder, token_ids):
    """The encoder's own padded forward, real tokens only, in stream order."""
    width = max(map(len, token_ids))
    input_ids = torch.tensor([ids + [1] * (width - len(ids)) for ids in token_ids])
    mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in token_ids])
    return encoder(input_ids=input_ids, attention_mask=mask).last_hidden_state[mask.bool()]


def packed_hidden(encoder, token_ids):
    texts = pack_texts(token_ids)
    return encode_packed(encoder, texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1, texts.lengths)


def norms_in_own_dtype(encoder):
    """RMS norms of the Llama line are computed in fp32 whatever the dtype, and their rounding in sums over
    tokens would hide what a float64 test looks for: compute them in the dtype of their input, on both
    sides."""
    for module in encoder.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(own_dtype_norm, module)
    return encoder


def own_dtype_norm(norm, x):
    weight = 1 + norm.weight if type(norm).__name__.startswith("Gemma") else norm.weight
    eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def twins(family, dtype, attention=None):
    """One set of weights in a packed encoder and in a padded one."""
    torch.manual_seed(0)
    config = tiny(family, attention=attention)
    packed = build_backbone(config, dtype=dtype).eval()
    # eager takes its softmax in fp32 whatever the dtype, and its float64 mask overflows there
    reference = "sdpa" if dtype is torch.float64 else "eager"
    padded = AutoModel.from_config(copy.deepcopy(config), attn_implementation=reference, dtype=dtype).eval()
    assert not padded.load_state_dict(packed.state_dict(), strict=False).unexpected_keys
    return norms_in_own_dtype(packed), norms_in_own_dtype(padded)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("family", "attention"), READINGS)
def test_outputs_and_gradients_equal_the_padded_model(family, attention, dtype):
    packed, padded = twins(family, dtype, attention)
    token_ids = random_token_ids(LENGTHS)
    tolerance = {"rtol": 1e-9, "atol": 1e-10} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 2e-5}
    expected, got = padded_hidden(padded, token_ids), packed_hidden(packed, token_ids)
    torch.testing.assert_close(got, expected, **tolerance)

    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    (expected * direction).mean().backward()
    (got * direction).mean().backward()
    wanted = {
        name: parameter.grad for name, parameter in padded.named_parameters() if parameter.grad is not None
    }
    for name, parameter in packed.named_parameters():
        torch.testing.assert_close(
            parameter.grad, wanted[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_modernbert_windows_matter():
    """Guards the test above: without windows ModernBERT's outputs would differ."""
    packed, padded = twins("modernbert", torch.float64)
    wide = copy.deepcopy(packed)
    for layer in wide.layers:
        layer.attn.sliding_window = None
    token_ids = random_token_ids([40])
    assert (packed_hidden(wide, token_ids) - padded_hidden(padded, token_ids)).abs().max() > 1e-3


@pytest.mark.parametrize("length", [5, 6, 64, 65, 200, 257, 300, 321])
@pytest.mark.parametrize("half_window", [1, 4, 80])
def test_windows_equal_a_naive_masked_softmax(length, half_window):
    generator = torch.Generator().manual_seed(length)
    count, heads, head_dim = 2, 2, 8
    leaves = [
        torch.randn(
            1, heads, count * length, head_dim, generator=generator, dtype=torch.float64, requires_grad=True
        )
        for _ in range(3)
    ]
    cu_seqlens = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    got, weights = packed_attention(
        torch.nn.Module(),
        *leaves,
        None,
        cu_seqlens=cu_seqlens,
        lengths=(length, length),
        max_length=length,
        sliding_window=half_window + 1,
        scaling=0.3,
    )
    assert weights is None
    assert got.shape == (1, count * length, heads, head_dim)
    q, k, v = leaves
    position = torch.arange(count * length)
    visible = ((position[:, None] - position).abs() <= half_window) & (
        position[:, None] // length == position // length
    )
    logits = (q @ k.transpose(2, 3) * 0.3).masked_fill(~visible, -torch.inf)
    expected = (logits.softmax(-1) @ v).transpose(1, 2)
    torch.testing.assert_close(got, expected)
    direction = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    got_gradients = torch.autograd.grad((got * direction).sum(), leaves)
    for got_gradient, gradient in zip(
        got_gradients, torch.autograd.grad((expected * direction).sum(), leaves)
    ):
        torch.testing.assert_close(got_gradient, gradient)


def test_no_text_sees_another():
    encoder = build_backbone(tiny("xlm-roberta")).eval()
    first, second, third = random_token_ids([12, 30, 7])
    together = packed_hidden(encoder, [first, second, third])
    alone = packed_hidden(encoder, [second])
    torch.testing.assert_close(together[12:42], alone, rtol=1e-4, atol=1e-5)


def test_order_of_texts_does_not_matter():
    encoder = build_backbone(tiny("xlm-roberta")).eval()
    token_ids = random_token_ids([9, 4, 9, 30, 4])
    parts = packed_hidden(encoder, token_ids).split([len(ids) for ids in token_ids])
    order = [3, 0, 4, 2, 1]
    shuffled = packed_hidden(encoder, [token_ids[i] for i in order]).split([len(token_ids[i]) for i in order])
    for i, part in zip(order, shuffled):
        torch.testing.assert_close(part, parts[i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["xlm-roberta", "modernbert"])
def test_an_empty_stream_touches_every_parameter_and_moves_none(family):
    encoder = build_backbone(tiny(family, dropout=0.1)).train()
    hidden = packed_hidden(encoder, [])
    assert hidden.shape == (0, 32)
    hidden.sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


@pytest.mark.parametrize("family", ["xlm-roberta", "modernbert"])
def test_dropout_is_seeded_and_off_in_eval(family):
    torch.manual_seed(0)
    encoder = build_backbone(tiny(family, dropout=0.2)).train()
    token_ids = random_token_ids(LENGTHS)

    def run(seed):
        torch.manual_seed(seed)
        return packed_hidden(encoder, token_ids)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    encoder.eval()
    assert torch.equal(run(1), run(2))


def test_attention_dropout_keeps_the_mean():
    """Only attention weights drop here, so the mean over seeds of one layer's attention output tends to the
    output without dropout."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 24, 8, generator=generator) for _ in range(3))
    texts = {
        "cu_seqlens": torch.tensor([0, 12, 24], dtype=torch.int32),
        "lengths": (12, 12),
        "max_length": 12,
    }
    plain, _ = packed_attention(torch.nn.Module(), q, k, v, None, **texts)
    torch.manual_seed(0)
    samples = torch.stack(
        [packed_attention(torch.nn.Module(), q, k, v, None, dropout=0.3, **texts)[0] for _ in range(2000)]
    )
    error = (samples.mean(0) - plain).abs() / (samples.std(0) / 2000**0.5)
    assert samples.std(0).min() > 0
    assert error.max() < 5  # standard errors, over 384 numbers


def test_activation_checkpointing_passes_the_texts_on():
    encoder = build_backbone(tiny("xlm-roberta", dropout=0.1)).train()
    token_ids = random_token_ids([9, 4, 9])

    def gradients():
        encoder.zero_grad()
        torch.manual_seed(3)
        packed_hidden(encoder, token_ids).square().sum().backward()
        return [parameter.grad.clone() for parameter in encoder.parameters()]

    plain = gradients()
    encoder.activation_checkpointing_enable()
    for checkpointed, gradient in zip(gradients(), plain):
        torch.testing.assert_close(checkpointed, gradient)


def test_runs_join_neighbours_of_equal_length():
    assert equal_length_runs((4, 4, 2, 4)) == ((4, 2), (2, 1), (4, 1))
    assert equal_length_runs(()) == ()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["xlm-roberta", "modernbert"])
def test_the_varlen_kernel_equals_the_padded_model_in_bf16(family):
    packed, padded = twins(family, torch.float32)
    token_ids = random_token_ids(LENGTHS)
    expected = padded_hidden(padded, token_ids)
    encoder = packed.to("cuda", torch.bfloat16)
    texts = pack_texts(token_ids).to("cuda")
    got = encode_packed(encoder, texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1, texts.lengths)
    # three layers in bf16 (8 bits of mantissa) on values of order 1
    assert (got.float().cpu() - expected).abs().mean() < 0.02


def test_a_second_model_of_the_same_config_changes_nothing():
    config = tiny("xlm-roberta")
    encoder = build_backbone(config).eval()
    token_ids = random_token_ids([9, 4])
    before = packed_hidden(encoder, token_ids)
    AutoModel.from_config(config, attn_implementation="sdpa")
    assert torch.equal(packed_hidden(encoder, token_ids), before)


def test_an_encoder_with_other_attention_is_never_run():
    encoder = AutoModel.from_config(tiny("xlm-roberta"), attn_implementation="sdpa")
    with pytest.raises(AssertionError, match="attention was changed"):
        packed_hidden(encoder, random_token_ids([9, 4]))


def test_bf16_on_a_cpu_attends_in_fp32_and_rounds_once():
    lengths = (5, 17, 17, 40)
    query, key, value = (torch.randn(1, 2, sum(lengths), 8).bfloat16().requires_grad_() for _ in range(3))
    packed, _ = packed_attention(None, query, key, value, None, lengths=lengths, max_length=40)
    texts = zip(*(x[0].float().split(lengths, dim=1) for x in (query, key, value)))
    naive = [((q @ k.mT) / 8**0.5).softmax(-1) @ v for q, k, v in texts]
    wanted = torch.cat(naive, dim=1).transpose(0, 1).bfloat16()
    # one rounding to bf16 apart at most: both are fp32 inside, in another order of sums
    assert torch.allclose(packed[0].float(), wanted.float(), rtol=2**-8, atol=0)
    got = torch.autograd.grad(packed.float().square().sum(), [query, key, value], retain_graph=True)
    expected = torch.autograd.grad(wanted.float().square().sum(), [query, key, value])
    for mine, theirs in zip(got, expected):
        assert mine.dtype == torch.bfloat16
        assert torch.allclose(mine.float(), theirs.float(), rtol=2**-7, atol=1e-5)
