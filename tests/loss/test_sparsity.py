"""FLOPS and L1 against N × V matrices over all ranks' texts, in float64."""

import pytest
import torch

from megam3.config.objective import UnifiedConfig
from megam3.config.weights import SparsityConfig
from megam3.dist import comm
from megam3.dist.gather import gather_rows
from megam3.loss.sparsity import ramp, sparsity, sparsity_loss
from tests.ranks import run_ranks
from tests.representations import random_representations

SIZES = (4, 0, 3)
"""Texts of each rank; one has none."""


def _whole(leaves) -> torch.Tensor:
    """[all texts, V]."""
    rows = []
    for texts in leaves:
        spans = texts.lexical_offsets_N1.tolist()
        for a, b in zip(spans, spans[1:]):
            zero = torch.zeros(23, dtype=torch.float64)
            rows.append(zero.index_put((texts.lexical_ids_Z[a:b],), texts.lexical_weights_Z[a:b]))
    return torch.stack(rows)


def _naive(kind: str, world_size: int):
    texts = [random_representations(SIZES[r], 60 + r) for r in range(world_size)]
    whole_NV = _whole(texts)
    value = whole_NV.mean(0).square().sum() if kind == "flops" else whole_NV.sum(1).mean()
    leaves = [each.lexical_weights_Z for each in texts if each.num_texts]
    return value.detach(), torch.cat(torch.autograd.grad(value, leaves))


def _one_rank() -> list:
    texts = random_representations(SIZES[comm.rank()], 60 + comm.rank())
    total = sum(SIZES[: comm.world_size()])
    results = []
    for kind in ("flops", "l1"):
        value = sparsity(texts, kind, total)
        (grad,) = torch.autograd.grad(value, [texts.lexical_weights_Z], allow_unused=True)
        grad = torch.zeros_like(texts.lexical_weights_Z) if grad is None else grad
        mean = comm.all_reduce_sum(value.detach()) / comm.world_size()
        # the engine takes the mean over ranks
        results.append([mean, gather_rows(grad) / comm.world_size()])
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 3])
def test_values_and_gradients_equal_whole_matrices(world_size):
    for kind, (value, grad) in zip(("flops", "l1"), run_ranks(_one_rank, world_size)[-1], strict=True):
        expected, expected_grad = _naive(kind, world_size)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-15)


def test_the_weights_grow_with_the_square_of_the_step():
    assert [ramp(step, 10) for step in (0, 4, 9, 50)] == [0.01, 0.25, 1.0, 1.0]
    texts = random_representations(4, 60)
    config = SparsityConfig(query_weight=2.0, passage_weight=0.0, ramp_steps=10)
    total, named = sparsity_loss(texts, texts, config, 4, 4, step=4)
    assert total.item() == pytest.approx(0.25 * 2.0 * named["sparsity_query"].item(), rel=1e-12)


def test_without_a_lexical_head_there_is_nothing_to_regularise():
    (problem,) = UnifiedConfig(heads=["dense"], sparsity=SparsityConfig()).problems()
    assert str(problem).startswith("objective.sparsity")
