"""Batched cross-attention against one softmax a text, in float64."""

import pytest
import torch

from megam3.model import cross_attention as module
from megam3.model.cross_attention import cross_attention


def one_by_one(query, key, value, rows, keys):
    outputs = []
    for q, k, v in zip(query.split(rows), key.split(keys), value.split(keys)):
        weights = (torch.einsum("rhd,khd->hrk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        outputs.append(torch.einsum("hrk,khd->rhd", weights, v))
    return torch.cat(outputs)


@pytest.mark.parametrize(
    ("rows", "keys", "calls"),
    [
        ([3, 2, 3, 0, 2, 3], [3, 3, 3, 2, 3, 2], 4),
        ([4, 4, 4], [5, 5, 5], 1),
        ([1], [1], 1),
        ([0, 0], [1, 1], 1),
    ],
)
def test_equal_halves_share_a_call_and_change_nothing(monkeypatch, rows, keys, calls):
    torch.manual_seed(0)
    counted, real = [], module.scaled_dot_product_attention
    monkeypatch.setattr(module, "scaled_dot_product_attention", lambda *x: counted.append(1) or real(*x))
    shapes = [(sum(n), 2, 4) for n in (rows, keys, keys)]
    ours = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    result, expected = cross_attention(*ours, rows, keys), one_by_one(*theirs, rows, keys)
    assert len(counted) == calls
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    (result * weights).sum().backward()
    (expected * weights).sum().backward()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-13)


def test_no_texts_keep_a_graph():
    leaves = [torch.zeros(0, 2, 4, requires_grad=True) for _ in range(3)]
    cross_attention(*leaves, [], []).sum().backward()
    assert all(x.grad is not None for x in leaves)
