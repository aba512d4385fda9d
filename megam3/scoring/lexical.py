"""Lexical scores: s(q, p) = Σ over ids in both of w_q · w_p, from (id, weight) pairs alone.

The vocabulary never appears: of the passages' pairs only those whose id occurs in a query count, and ids are
renumbered to those of the queries. Queries {7: .5, 9: 1.} and {9: 2.}, passage {3: 4., 9: 3.}: ids in queries
are [7, 9], the passage keeps {9: 3.} as column 1, and

    passages (sparse)  [0 3.]    times    queries (dense, transposed)  [.5 0.]    =  [3. 6.]
                                                                       [1. 2.]

Queries go through in blocks, so that the dense side stays bounded. The backward pass is one product sampled
at the passages' pairs and one with the transposed sparse side; weights in bf16 are accumulated in fp32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megam3.scoring.sparse import csr_product, sampled_product, transposed_pattern

BLOCK_ELEMENTS = 1 << 24
"""Entries of the dense side (ids of the block's queries × queries of the block) held at a time."""


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """(id, weight) pairs of some texts."""

    ids_Z: Tensor
    weights_Z: Tensor
    offsets_N1: Tensor
    counts: Sequence[int] = ()
    """Of each text, on the host; asked of queries alone."""

    def text_Z(self) -> Tensor:
        """Text of each pair."""
        lengths = self.offsets_N1[1:] - self.offsets_N1[:-1]
        return torch.repeat_interleave(
            torch.arange(lengths.shape[0], device=lengths.device), lengths, output_size=self.ids_Z.shape[0]
        )


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Queries first … stop-1 as a dense [U, n] side, and the passages' pairs with those U ids as a sparse [P,
    U] side."""

    queries: slice
    pairs: slice
    query_places: tuple[Tensor, Tensor]
    """(column of the id, query within the block) of each pair of the block's queries."""
    dense_Un: Tensor
    crow: Tensor
    columns: Tensor
    rows: Tensor
    kept: Tensor | slice
    """Which of the passages' pairs the sparse side holds."""


def _ranges(counts: Sequence[int], max_elements: int) -> Iterator[tuple[slice, slice]]:
    """Cut queries, with so many pairs each, so that (pairs of a block) × (queries of a block), which bounds
    the dense side, stays within max_elements."""
    offsets = [0, *accumulate(counts)]
    start = 0
    for stop in range(1, len(offsets)):
        if (
            stop == len(offsets) - 1
            or (offsets[stop + 1] - offsets[start]) * (stop + 1 - start) > max_elements
        ):
            yield slice(start, stop), slice(offsets[start], offsets[stop])
            start = stop


def _block(
    queries: _Pairs,
    query_Z: Tensor,
    passages: _Pairs,
    passage_Z: Tensor,
    texts: slice,
    pairs: slice,
    dtype: torch.dtype,
) -> _Block:
    # the block's ids stay as often as they occur, and the first place of each is its row: their number is
    # known without asking the device. The row after the last is zero, for ids that no query has
    ids_z = queries.ids_Z[pairs]
    ids_U = ids_z.sort().values
    num_ids = ids_U.shape[0]
    column_z, query_z = torch.searchsorted(ids_U, ids_z), query_Z[pairs] - texts.start
    dense_Un = torch.zeros(num_ids + 1, texts.stop - texts.start, dtype=dtype, device=ids_U.device)
    dense_Un[column_z, query_z] = queries.weights_Z[pairs].to(dtype)
    place_Z = torch.searchsorted(ids_U, passages.ids_Z)
    known_Z = torch.zeros_like(place_Z, dtype=torch.bool)
    if num_ids:
        known_Z = ids_U[place_Z.clamp(max=num_ids - 1)] == passages.ids_Z
    kept: Tensor | slice = slice(None)
    crow = passages.offsets_N1
    if place_Z.device.type == "cpu":
        # fewer pairs make the product faster; on a device their number would have to be waited for
        kept = known_Z.nonzero().squeeze(1)
        crow = torch.cat([known_Z.new_zeros(1, dtype=torch.int64), known_Z.cumsum(0)])[crow]
    return _Block(
        queries=texts,
        pairs=pairs,
        query_places=(column_z, query_z),
        dense_Un=dense_Un,
        crow=crow.to(torch.int32),
        columns=place_Z.masked_fill(~known_Z, num_ids)[kept].to(torch.int32),
        rows=passage_Z[kept],
        kept=kept,
    )


def _blocks(queries: _Pairs, passages: _Pairs, dtype: torch.dtype, max_elements: int) -> Iterator[_Block]:
    query_Z, passage_Z = queries.text_Z(), passages.text_Z()
    for texts, pairs in _ranges(queries.counts, max_elements):
        yield _block(queries, query_Z, passages, passage_Z, texts, pairs, dtype)


class _Lexical(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query_w: Tensor, passage_w: Tensor, queries: _Pairs, passages: _Pairs, max_elements: int
    ) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(query_w.dtype, passage_w.dtype), torch.float32)
        num_queries, num_passages = queries.offsets_N1.shape[0] - 1, passages.offsets_N1.shape[0] - 1
        scores_QP = torch.zeros(num_queries, num_passages, dtype=dtype, device=query_w.device)
        for block in _blocks(queries, passages, dtype, max_elements):
            values = passage_w[block.kept].to(dtype)
            scores_QP[block.queries] = csr_product(block.crow, block.columns, values, block.dense_Un).T
        # weights are saved through autograd, so that changing them in place before the backward pass is
        # noticed
        ctx.save_for_backward(query_w, passage_w)
        # without their weights, which the graph's own saving keeps
        ctx.structure = replace(queries, weights_Z=query_w[:0]), replace(passages, weights_Z=passage_w[:0])
        ctx.max_elements = max_elements
        return scores_QP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QP: Tensor) -> tuple[Tensor | None, ...]:
        query_w, passage_w = ctx.saved_tensors
        queries, passages = ctx.structure
        queries, passages = replace(queries, weights_Z=query_w), replace(passages, weights_Z=passage_w)
        dtype = grad_QP.dtype
        grad_query, grad_passage = (
            torch.zeros_like(query_w, dtype=dtype),
            torch.zeros_like(passage_w, dtype=dtype),
        )
        for block in _blocks(queries, passages, dtype, ctx.max_elements):
            grad_Pn = grad_QP[block.queries].T.contiguous()
            sampled = sampled_product(block.crow, block.columns, grad_Pn, block.dense_Un.T.contiguous())
            grad_passage[block.kept] += sampled
            crow, columns, order = transposed_pattern(block.rows, block.columns, block.dense_Un.shape[0])
            grad_Un = csr_product(crow, columns, passage_w[block.kept].to(dtype)[order], grad_Pn)
            grad_query[block.pairs] = grad_Un[block.query_places]
        return grad_query.to(query_w.dtype), grad_passage.to(passage_w.dtype), None, None, None


def lexical_scores(
    query_weights_Z: Tensor,
    query_ids_Z: Tensor,
    query_offsets_Q1: Tensor,
    passage_weights_Z: Tensor,
    passage_ids_Z: Tensor,
    passage_offsets_P1: Tensor,
    block_elements: int = BLOCK_ELEMENTS,
    query_counts: Sequence[int] | None = None,
) -> Tensor:
    """Lexical scores of every query with every passage (arXiv 2402.03216, section 3.2), not normalised.

    Args:
        query_weights_Z, passage_weights_Z: weight of each pair; gradients flow to them.
        query_ids_Z, passage_ids_Z: int64, distinct and ascending within a text.
        query_offsets_Q1, passage_offsets_P1: int64; pairs of text n are offsets[n] … offsets[n+1]-1.
        block_elements: bound on the dense side held at a time.
        query_counts: pairs of each query, where the host knows them; None: read from the device.

    Returns:
        scores_QP, fp32 (fp64 for fp64 weights). A text without pairs scores 0.
    """
    if query_counts is None:
        query_counts = (query_offsets_Q1[1:] - query_offsets_Q1[:-1]).tolist()
    queries = _Pairs(
        ids_Z=query_ids_Z,
        weights_Z=query_weights_Z.detach(),
        offsets_N1=query_offsets_Q1,
        counts=query_counts,
    )
    passages = _Pairs(
        ids_Z=passage_ids_Z, weights_Z=passage_weights_Z.detach(), offsets_N1=passage_offsets_P1
    )
    return _Lexical.apply(query_weights_Z, passage_weights_Z, queries, passages, block_elements)
