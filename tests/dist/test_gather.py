import pytest
import torch

from megam3.dist import comm
from megam3.dist.gather import exchange_columns, gather_offsets, gather_rows
from tests.ranks import run_ranks

COUNTS = (2, 0, 3, 1)
ROWS = (3, 1, 0, 2)


def _rows(rank, dtype=torch.float64):
    return (100 * rank + torch.arange(ROWS[rank] * 2, dtype=dtype).view(-1, 2)).requires_grad_(
        dtype.is_floating_point
    )


def _convention(rank, world):
    """A loss with unequal local row counts, scaled as the docstring says: what each rank's engine would
    average."""
    weight = torch.tensor([[0.5, -1.0], [2.0, 0.25]], dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(sum(ROWS[:world]), 2, generator=generator, dtype=torch.float64)
    first = sum(ROWS[:rank])
    own = inputs[first : first + ROWS[rank]] @ weight
    logits = own @ gather_rows(own).T
    labels = torch.arange(first, first + ROWS[rank])
    loss = world / sum(ROWS[:world]) * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    return loss.detach(), weight.grad


def _exchanges():
    rank, world = comm.rank(), comm.world_size()
    result = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64):
        rows = _rows(rank, dtype)
        gathered = gather_rows(rows)
        assert gathered.dtype == dtype
        assert torch.equal(gathered, torch.cat([_rows(r, dtype) for r in range(world)]))
        if dtype.is_floating_point:
            # every rank sends back its number + 1: the owner receives the sum
            (grad,) = torch.autograd.grad(gathered, rows, torch.full_like(gathered, rank + 1.0))
            assert torch.equal(grad, torch.full_like(rows, sum(range(1, world + 1))))
    offsets = gather_offsets(torch.arange(COUNTS[rank] + 1) * (rank + 1))
    assert offsets.tolist() == [
        0,
        *torch.tensor([r + 1 for r in range(world) for _ in range(COUNTS[r])]).cumsum(0).tolist(),
    ]

    queries, passages = COUNTS[:world], ROWS[:world]
    full = torch.arange(2 * sum(queries) * sum(passages), dtype=torch.float64).view(
        2, sum(queries), sum(passages)
    )
    rows_of = slice(sum(queries[:rank]), sum(queries[: rank + 1]))
    columns_of = slice(sum(passages[:rank]), sum(passages[: rank + 1]))
    blocks = full[:, :, columns_of].clone().requires_grad_()
    exchanged = exchange_columns(blocks, queries, passages)
    assert torch.equal(exchanged, full[:, rows_of])
    (grad,) = torch.autograd.grad(exchanged, blocks, 3 * full[:, rows_of])
    assert torch.equal(grad, 3 * full[:, :, columns_of])

    result["loss"], result["grad"] = _convention(rank, world)
    return result


@pytest.mark.ranks
@pytest.mark.parametrize("world", [2, 4])
def test_exchanges_and_the_gradient_convention(world):
    results = run_ranks(_exchanges, world)
    weight = torch.tensor([[0.5, -1.0], [2.0, 0.25]], dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(
        sum(ROWS[:world]), 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    vectors = inputs @ weight
    loss = torch.nn.functional.cross_entropy(vectors @ vectors.T, torch.arange(len(inputs)))
    loss.backward()
    torch.testing.assert_close(torch.stack([x["loss"] for x in results]).mean(), loss.detach())
    torch.testing.assert_close(torch.stack([x["grad"] for x in results]).mean(0), weight.grad)


def test_without_a_group_everything_is_the_identity():
    rows = _rows(0)
    assert gather_rows(rows) is rows
    assert exchange_columns(rows, (1,), (2,)) is rows
    assert gather_offsets(rows) is rows
