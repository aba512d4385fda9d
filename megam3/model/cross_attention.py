"""Attention of rows over keys of another stream, half by half, as RetroMAE's decoder needs it."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

from megam3.dist import comm
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
    calls as distinct pairs, for one copy of the streams and one back.
    """
    if not rows:  # a rank without texts: nothing to attend, and still a graph through all three
        return query_RHd + key_KHd.sum() + value_KHd.sum()
    if fits_varlen(query_RHd.device, query_RHd.dtype, query_RHd.shape[-1]):
        offsets = torch.tensor([[0, *accumulate(x)] for x in (rows, keys)], dtype=torch.int32)
        cu_rows, cu_keys = comm.copy_pinned(offsets, query_RHd.device)
        found = varlen_attn(query_RHd, key_KHd, value_KHd, cu_rows, cu_keys, max(rows), max(keys))
        assert isinstance(found, Tensor)  # the log-sum-exps come too only where they are asked for
        return found
    together = _equal_halves(tuple(rows), tuple(keys))
    # halves of one size, or sorted ones, stay where they are: no operation then looks at a single text
    in_place = together.order == tuple(range(len(rows)))
    streams = [query_RHd, key_KHd, value_KHd]
    if not in_place:
        # split and cat: index_select was measured twice as slow on CPUs (docs/experiments.md)
        parts_of = (query_RHd.split(rows), key_KHd.split(keys), value_KHd.split(keys))
        streams = [torch.cat([parts[half] for half in together.order]) for parts in parts_of]
    row_sizes = [group.count * group.rows for group in together.groups]
    key_sizes = [group.count * group.keys for group in together.groups]
    outputs: list[Tensor] = []
    for group, *parts in zip(
        together.groups, streams[0].split(row_sizes), streams[1].split(key_sizes), streams[2].split(key_sizes)
    ):
        q, k, v = (x.unflatten(0, (group.count, -1 if len(x) else 0)).transpose(1, 2) for x in parts)
        out = scaled_dot_product_attention(q, k, v).transpose(1, 2)
        outputs.append(out.flatten(0, 1))
    joined_RHd = torch.cat(outputs)
    if in_place:
        return joined_RHd
    sizes = [rows[half] for half in together.order]
    attended = dict(zip(together.order, joined_RHd.split(sizes), strict=True))
    return torch.cat([attended[half] for half in range(len(rows))])


def _equal_halves(rows: tuple[int, ...], keys: tuple[int, ...]) -> EqualHalves:
    members: dict[tuple[int, int], list[int]] = {}
    for half, pair in enumerate(zip(rows, keys)):
        members.setdefault(pair, []).append(half)
    groups = tuple(HalfGroup(rows=r, keys=k, count=len(halves)) for (r, k), halves in members.items())
    return EqualHalves(groups, tuple(half for halves in members.values() for half in halves))
