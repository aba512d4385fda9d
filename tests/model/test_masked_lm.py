"""Chunked cross-entropy over tied embeddings against torch's own, in float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from megam3.model.masked_lm import tied_cross_entropy


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
def test_loss_and_all_gradients_equal_the_whole_logits(chunk_rows):
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(7, 5).double(), torch.randn(11, 5).double(), torch.randn(11).double()
    targets, scale = torch.randint(11, (7,)), torch.rand(7).double()
    results = []
    for chunked in (True, False):
        leaves = [x.clone().requires_grad_() for x in (rows, weight, bias)]
        if chunked:
            loss, _ = tied_cross_entropy(*leaves, targets, scale, chunk_rows)
        else:
            logits = leaves[0] @ leaves[1].T + leaves[2]
            loss = (cross_entropy(logits, targets, reduction="none") * scale).sum()
        (3 * loss).backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_rows_give_zero_and_zero_gradients():
    weight = torch.randn(11, 5, requires_grad=True)
    rows = torch.zeros(0, 5, requires_grad=True)
    loss, losses = tied_cross_entropy(rows, weight, torch.zeros(11), torch.zeros(0).long(), torch.zeros(0))
    loss.backward()
    assert loss == 0
    assert losses.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros(11, 5))
