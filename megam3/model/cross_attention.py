"""Attention of rows over keys of another stream, half by half, as RetroMAE's decoder needs it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from megam3.model.attention import fits_varlen


@dataclass(frozen=True, kw_only=True)
class HalfGroup:
    """Halves that share one attention call."""

    rows: int
    keys: int
    count: int


@dataclass(frozen=True)
class EqualHalves:
    """Which halves go together: `order` lists them group after group."""

    groups: tuple[HalfGroup, ...]
    order: tuple[int, ...]


def cross_attention(
    query_RHd: Tensor, key_KHd: Tensor, value_KHd: Tensor, rows: list[int], keys: list[int]
) -> Tensor:
    """Rows of half s over the keys of half s; one kernel on CUDA in half precision.

    Elsewhere halves with equal (rows, keys) share one batched call, wherever they lie in the stream: as many
    calls as distinct pairs, for one gather of the stream and one back.
    """
    if not rows:  # a rank without texts: nothing to attend, and still a graph through all three
        return query_RHd + key_KHd.sum() + value_KHd.sum()
    if fits_varlen(query_RHd.device, query_RHd.dtype, query_RHd.shape[-1]):
        cu_rows, cu_keys = (
            torch.tensor([0, *x], device=query_RHd.device).cumsum(0).to(torch.int32) for x in (rows, keys)
        )
        return varlen_attn(query_RHd, key_KHd, value_KHd, cu_rows, cu_keys, max(rows), max(keys))
    together = _equal_halves(tuple(rows), tuple(keys))
    row_order_R, key_order_K = (
        _stream_order(lengths, together.order, query_RHd.device) for lengths in (rows, keys)
    )
    # split, not slices: its backward is one concatenation
    queries = query_RHd.index_select(0, row_order_R).split([g.count * g.rows for g in together.groups])
    key_sizes = [g.count * g.keys for g in together.groups]
    keyed = [x.index_select(0, key_order_K).split(key_sizes) for x in (key_KHd, value_KHd)]
    outputs = []
    for group, query, key, value in zip(together.groups, queries, *keyed):
        q = query.unflatten(0, (group.count, group.rows)).transpose(1, 2)
        k, v = (x.unflatten(0, (group.count, group.keys)).transpose(1, 2) for x in (key, value))
        outputs.append(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, row_order_R.argsort())


def _equal_halves(rows: tuple[int, ...], keys: tuple[int, ...]) -> EqualHalves:
    members: dict[tuple[int, int], list[int]] = {}
    for half, pair in enumerate(zip(rows, keys)):
        members.setdefault(pair, []).append(half)
    groups = tuple(HalfGroup(rows=r, keys=k, count=len(halves)) for (r, k), halves in members.items())
    return EqualHalves(groups, tuple(half for halves in members.values() for half in halves))


def _stream_order(lengths: list[int], order: tuple[int, ...], device: torch.device) -> Tensor:
    """Stream indices of runs of these lengths, the runs taken in `order`."""
    lengths_S = torch.tensor(lengths, device=device)
    starts_S = lengths_S.cumsum(0) - lengths_S
    order_G = torch.tensor(order, dtype=torch.int64, device=device)
    taken_G = lengths_S[order_G]
    shift_G = starts_S[order_G] - (taken_G.cumsum(0) - taken_G)
    return torch.arange(sum(lengths[s] for s in order), device=device) + shift_G.repeat_interleave(taken_G)
