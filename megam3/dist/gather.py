"""Differentiable exchange of ragged rows between ranks, and THE gradient convention of this package, derived
once.

Let rank r of W hold n_r rows (queries) with losses l_i, N = Σ_r n_r, and let the loss of the whole batch be L
= (1/N) Σ_i l_i.

1. Rank r computes  L_r = W · (Σ over ITS rows of l_i) / N.  The mean of L_r over ranks is L, whatever the n_r
are. 2. l_i depends on representations x_s made on any rank s. The backward pass of an exchange SUMS what all
ranks send back for x_s:
   the gradient arriving at x_s is  Σ_r ∂L_r/∂x_s = W · ∂L/∂x_s.
3. Rank s pushes that through its own encoder; the engine AVERAGES parameter gradients over ranks:
   (1/W) Σ_s W · ∂L/∂x_s · ∂x_s/∂θ = ∂L/∂θ,  the gradient of one rank holding the whole batch.

So W appears once, in the loss's scale, and no gather multiplies or divides by it. Every loss of the package
is scaled as in (1); token losses likewise, with tokens as rows. Clipping and logged norms then see the true
values.

Two exchanges are enough:
    gather_rows       every rank's rows to every rank (dense passages, queries of the other two heads)
    exchange_columns  scores of ALL queries against OWN passages  →  scores of OWN queries against ALL
    passages
                      (each number travels once, there and, as a gradient, back)

With 2 ranks, 1 and 2 queries, 2 and 1 passages, `exchange_columns` turns

    rank 0: rows q0 q1 q2, columns p0 p1      rank 0: row  q0,    columns p0 p1 p2
    rank 1: rows q0 q1 q2, column  p2     →   rank 1: rows q1 q2, columns p0 p1 p2

Payloads travel as bytes: every dtype works on gloo and NCCL, bit for bit; sums are taken in at least fp32, in
rank order.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megam3.dist import comm


def _to_bytes(tensor: Tensor) -> Tensor:
    flat = comm.copy_pinned(tensor.detach().contiguous(), comm.transfer_device()).reshape(-1)
    return flat.view(torch.uint8)


def _from_bytes(data: Tensor, like: Tensor, shape: Sequence[int]) -> Tensor:
    return data.view(like.dtype).reshape(tuple(shape)).to(like.device)


def _all_gather(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Rows of every rank in rank order; padded to the longest rank on the wire only where counts differ."""
    widest = max(counts)
    shape = tuple(rows.shape[1:])
    if rows.shape[0] < widest:
        rows = torch.cat([rows.detach(), rows.new_zeros(widest - rows.shape[0], *shape)])
    own = _to_bytes(rows)
    gathered = own.new_empty(own.numel() * len(counts))
    if gathered.numel():
        dist.all_gather_into_tensor(gathered, own)
    stacked = _from_bytes(gathered, rows, (len(counts), widest, *shape))
    if all(count == widest for count in counts):
        return stacked.reshape(len(counts) * widest, *shape)
    return torch.cat([stacked[r, :count] for r, count in enumerate(counts)])


def _all_to_all(parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Send parts[r] to rank r; receive from rank r a tensor of shapes[r], of the same dtype."""
    like = parts[0]
    sent = [_to_bytes(part) for part in parts]
    sizes = [torch.Size(shape).numel() * like.element_size() for shape in shapes]
    received = sent[0].new_empty(sum(sizes))
    dist.all_to_all_single(received, torch.cat(sent), sizes, [part.numel() for part in sent])
    return [_from_bytes(data, like, shape) for data, shape in zip(received.split(sizes), shapes)]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        return _all_gather(rows, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        own = (ctx.counts[comm.rank()], *grad.shape[1:])
        parts = _all_to_all(grad.split(ctx.counts), [own] * len(ctx.counts))
        total = torch.zeros(own, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)
        for part in parts:
            total += part
        return total.to(grad.dtype), None


class _ExchangeColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: Tensor, query_counts: tuple[int, ...], passage_counts: tuple[int, ...]
    ) -> Tensor:
        ctx.counts = query_counts, passage_counts
        lead, own = scores.shape[:-2], query_counts[comm.rank()]
        parts = _all_to_all(
            scores.split(query_counts, dim=-2), [(*lead, own, count) for count in passage_counts]
        )
        return torch.cat(parts, dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        query_counts, passage_counts = ctx.counts
        lead, own = grad.shape[:-2], passage_counts[comm.rank()]
        parts = _all_to_all(
            grad.split(passage_counts, dim=-1), [(*lead, count, own) for count in query_counts]
        )
        return torch.cat(parts, dim=-2), None, None


def row_counts(num_rows: int) -> tuple[int, ...]:
    """How many rows each rank holds."""
    return tuple(row[0] for row in comm.all_gather_ints([num_rows]))


def gather_rows(rows: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Concatenate every rank's rows in rank order; gradients of all ranks are summed into the owner's rows.

    Args:
        rows: [n_r, ...], n_r may differ between ranks and be 0; the remaining shape and the dtype agree.
        counts: every rank's n_r where the caller knows them (saves one round); None: asked from the ranks.
    """
    if not comm.is_grouped():
        return rows
    counts = row_counts(rows.shape[0]) if counts is None else tuple(counts)
    if rows.is_floating_point():
        return _GatherRows.apply(rows, counts)
    return _all_gather(rows, counts)


def gather_offsets(offsets_N1: Tensor, counts: Sequence[int] | None = None) -> Tensor:
    """Offsets of ragged rows over all ranks: those of the concatenation that `gather_rows` makes. `counts`
    are texts per rank."""
    if not comm.is_grouped():
        return offsets_N1
    lengths = gather_rows(offsets_N1[1:] - offsets_N1[:-1], counts)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def exchange_columns(scores: Tensor, query_counts: Sequence[int], passage_counts: Sequence[int]) -> Tensor:
    """From [..., all queries, own passages] to [..., own queries, all passages], both in rank order; the
    gradient takes the way back."""
    if not comm.is_grouped():
        return scores
    return _ExchangeColumns.apply(scores, tuple(query_counts), tuple(passage_counts))
