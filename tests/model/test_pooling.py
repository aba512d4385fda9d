"""Every pooling of the dense head against the padded model written out text by text: vectors, the other heads
beside it, and the gradient of every parameter."""

import pytest
import torch
from torch import nn

from megam3.model.m3 import M3Model, represent
from megam3.model.pooling import insert_cls, mean_rows
from megam3.packed_texts import pack_texts
from megam3.reading import POOLINGS, Reading
from tests.factory import random_token_ids
from tests.model.test_attention import twins

LENGTHS = (9, 1, 4, 5, 9, 30, 2, 8)
"""Around multiples of 4, the distance of `<s>` under mcls; equal ones apart; and a text of one token."""
EVERY = 4


def model_of(encoder, pooling):
    model = M3Model(encoder, (0, 1, 2, 3), reading=Reading(pooling=pooling, cls_every_tokens=EVERY))
    generator = torch.Generator().manual_seed(2)
    for head in (model.lexical_head, model.multi_vector_head):
        head.weight.data = torch.randn(head.weight.shape, generator=generator) * 0.3
    return model.double().eval()


def with_cls(ids):
    """`<s>` (0) before every EVERY-th token; and which tokens of the result are the text's own."""
    longer, own, cls = [], [], []
    for offset, token in enumerate(ids):
        if offset % EVERY == 0 and offset:
            cls.append(len(longer))
            longer.append(0)
        if offset == 0:
            cls.append(0)
        own.append(len(longer))
        longer.append(token)
    return longer, own, cls


def naive_heads(encoder, model, pooling, ids):
    """One text alone through the padded model: its dense vector, {id: weight}, and its multi-vector rows."""
    own, cls = list(range(len(ids))), [0]
    read = ids
    if pooling == "mcls":
        read, own, cls = with_cls(ids)
    hidden = encoder(input_ids=torch.tensor([read])).last_hidden_state[0]
    rows = {"cls": hidden[:1], "mean": hidden, "last": hidden[-1:], "mcls": hidden[cls]}[pooling]
    dense = nn.functional.normalize(rows.mean(0), dim=0)
    weights: dict[int, torch.Tensor] = {}
    logits = torch.relu(model.lexical_head(hidden[own])).squeeze(-1)
    for token, logit in zip(ids, logits):
        if token not in model.special_ids:
            weights[token] = torch.maximum(weights.get(token, torch.zeros_like(logit)), logit)
    rows_KC = nn.functional.normalize(model.multi_vector_head(hidden[own][1:]), dim=-1)
    return dense, weights, rows_KC


@pytest.mark.parametrize("pooling", POOLINGS)
def test_heads_and_gradients_equal_the_padded_model(pooling):
    packed, padded = twins("xlm-roberta", torch.float64)
    model = model_of(packed, pooling)
    token_ids = random_token_ids(LENGTHS)
    got = represent(model, pack_texts(token_ids))
    wanted = [naive_heads(padded, model, pooling, ids) for ids in token_ids]
    dense = torch.stack([dense for dense, _, _ in wanted])
    weights = torch.stack([value for _, found, _ in wanted for _, value in sorted(found.items())])
    rows = torch.cat([rows for _, _, rows in wanted])
    exact = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(got.dense_ND, dense, **exact)
    torch.testing.assert_close(got.lexical_weights_Z, weights, **exact)
    torch.testing.assert_close(got.multi_KC, rows, **exact)

    generator = torch.Generator().manual_seed(3)
    pairs = [(got.dense_ND, dense), (got.lexical_weights_Z, weights), (got.multi_KC, rows)]
    direction = [torch.randn(a.shape, generator=generator, dtype=a.dtype) for a, _ in pairs]
    sum((a * d).sum() for (a, _), d in zip(pairs, direction)).backward()
    sums = sum((b * d).sum() for (_, b), d in zip(pairs, direction))
    reference = dict(padded.named_parameters())
    used = [name for name, _ in packed.named_parameters()]
    expected = torch.autograd.grad(sums, [reference[name] for name in used])
    for name, gradient in zip(used, expected):
        torch.testing.assert_close(dict(packed.named_parameters())[name].grad, gradient, **exact)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_an_empty_stream_touches_every_parameter(pooling):
    packed, _ = twins("xlm-roberta", torch.float64)
    model = model_of(packed, pooling)
    representations = represent(model, pack_texts([]))
    assert representations.dense_ND.shape == (0, 32)
    sum(tensor.sum() for tensor in representations.floats()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_tokens_put_in_stand_where_a_loop_puts_them():
    token_ids = random_token_ids(LENGTHS)
    texts = pack_texts(token_ids)
    reading = Reading(pooling="mcls", cls_every_tokens=EVERY)
    stream = insert_cls(
        texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1, texts.lengths, reading=reading, cls_id=0
    )
    loops = [with_cls(ids) for ids in token_ids]
    expected = pack_texts([longer for longer, _, _ in loops])
    assert stream.lengths == expected.lengths
    for name in ("input_ids_T", "position_ids_T", "cu_seqlens_N1"):
        got, wanted = getattr(stream, name), getattr(expected, name)
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted), name
    starts = expected.cu_seqlens_N1.tolist()
    assert stream.own_T.tolist() == [s + i for s, (_, own, _) in zip(starts, loops) for i in own]
    assert stream.cls_S.tolist() == [s + i for s, (_, _, cls) in zip(starts, loops) for i in cls]
    assert stream.cls_counts_N.tolist() == [len(cls) for _, _, cls in loops]
    assert [reading.inserted(len(ids)) for ids in token_ids] == [len(cls) - 1 for _, _, cls in loops]


@pytest.mark.parametrize("positions", range(1, 40))
def test_the_longest_text_that_fits_is_the_longest_that_a_search_finds(positions):
    reading = Reading(pooling="mcls", cls_every_tokens=EVERY)
    fitting = [n for n in range(1, 50) if n + reading.inserted(n) <= positions]
    assert reading.usable_tokens(positions) == max(fitting)
    assert Reading(pooling="mean").usable_tokens(positions) == positions


def test_the_mean_of_bf16_rows_is_taken_in_fp32():
    """1 + 1/256 is no bf16 number; 512 of them summed in bf16 would stop growing at 256."""
    rows = torch.ones(512, 1, dtype=torch.bfloat16).index_fill_(0, torch.tensor([0]), 3.0)
    mean = mean_rows(rows.requires_grad_(), torch.tensor([512]))
    assert mean.dtype == torch.float32
    assert mean.item() == 1 + 1 / 256
    mean.sum().backward()
    assert rows.grad.dtype == torch.bfloat16
    assert torch.equal(rows.grad.float(), torch.full((512, 1), 1 / 512))
