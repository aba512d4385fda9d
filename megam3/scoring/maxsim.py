"""MaxSim over ragged rows: for each query row its best passage row, then a mean (or sum) over the query's
rows.

    s(q, p) = (1/|q|) Σ_i max_j ⟨E_q[i], E_p[j]⟩          j runs over the rows the passage HAS: there is no
    padding that could win the max

The product of all query rows with all passage rows is formed in chunks and dropped at once; what stays for
the backward pass is one int32 per (query row, passage): which row won. With A the sparse [query rows, passage
rows] matrix of the pair's gradient at each winner,

    ∂E_q = A · E_p          ∂E_p = Aᵀ · E_q

two sparse-dense products, 1/L of the forward product's work each. On CUDA a Triton kernel finds the winners,
where triton is installed; the torch path is its reference and serves everything else. Worked example, one
query row e and passages of 2 and 1 rows: products [0.1, 0.7 | 0.3] → scores [0.7, 0.3], winners [1, 2], and A
has the two gradients at columns 1 and 2.

A text without rows (only `<s>` was in it) scores 0 with everything and receives no gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megam3.scoring.chunks import passages_at_a_time, products_at_a_time, rows_widened_at_a_time
from megam3.scoring.sparse import csr_product, transposed_csr
from megam3.scoring.winners import (
    Chunk,
    accumulation_dtype,
    best_by_kernel,
    best_by_torch,
    cut_texts,
    prefers_kernel,
    sum_rows,
)


@dataclass(frozen=True)
class _Rows:
    """Texts that all have rows."""

    lengths: list[int]
    offsets_N1: Tensor


def _pooling(queries: _Rows, reduction: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Query of each row and the weight it enters the query's score with: 1, or 1/|q| for the mean."""
    lengths = queries.offsets_N1[1:] - queries.offsets_N1[:-1]
    index = torch.arange(len(queries.lengths), device=lengths.device)
    query_K = torch.repeat_interleave(index, lengths, output_size=sum(queries.lengths))
    if reduction == "sum":
        return query_K, torch.ones(query_K.shape[0], dtype=dtype, device=lengths.device)
    return query_K, lengths.to(dtype).reciprocal()[query_K]


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """The sparse matrix A of the backward pass, and the rows on both of its sides."""

    query_KC: Tensor
    passage_KC: Tensor
    winner_KP: Tensor
    query_K: Tensor
    weight_K: Tensor
    grad_QP: Tensor
    use_kernel: bool
    """Multiply by the Triton kernel, which reads 16-bit rows as they are; torch's product wants them
    widened."""

    def product(self, crow: Tensor, columns: Tensor, values: Tensor, rows_XC: Tensor) -> Tensor:
        """Sparse [R, X] with entries in compressed rows, times rows_XC."""
        if self.use_kernel:
            assert sum_rows is not None
            return sum_rows(crow, columns, values, rows_XC.contiguous())
        return csr_product(crow, columns, values, rows_XC.to(values.dtype))

    def entries(self, rows: slice, passages: Chunk) -> tuple[Tensor, Tensor]:
        """Of some query rows and passages: the winner within the passages' rows, and its coefficient."""
        columns = (self.winner_KP[rows, passages.texts] - passages.rows.start).contiguous()
        coefficients = (
            self.grad_QP[:, passages.texts].index_select(0, self.query_K[rows]) * self.weight_K[rows, None]
        )
        return columns, coefficients


def _sum(products: Iterator[Tensor]) -> Tensor:
    """Of one or more; added up in the first, because one more pass over these rows would cost as much as
    their product."""
    total = next(products)
    for product in products:
        total += product
    return total


def _query_gradients(pairs: _Pairs, blocks: list[slice], chunks: list[Chunk]) -> Tensor:
    """A · E_p, one block of query rows at a time: what is accumulated in fp32 is that block."""

    def product(rows: slice, passages: Chunk) -> Tensor:
        columns, coefficients = pairs.entries(rows, passages)
        crow = torch.arange(columns.shape[0] + 1, dtype=torch.int32, device=columns.device) * columns.shape[1]
        return pairs.product(crow, columns.flatten(), coefficients.flatten(), pairs.passage_KC[passages.rows])

    grad_KC = torch.zeros_like(pairs.query_KC)
    for rows in blocks if chunks else []:
        grad_KC[rows] = _sum(product(rows, passages) for passages in chunks)
    return grad_KC


def _passage_gradients(pairs: _Pairs, blocks: list[slice], chunks: list[Chunk]) -> Tensor:
    """Aᵀ · E_q, one chunk of passages at a time."""

    def product(rows: slice, passages: Chunk) -> Tensor:
        columns, coefficients = pairs.entries(rows, passages)
        transposed = transposed_csr(columns, coefficients, passages.rows.stop - passages.rows.start)
        return pairs.product(*transposed, pairs.query_KC[rows])

    grad_KC = torch.empty_like(pairs.passage_KC) if blocks else torch.zeros_like(pairs.passage_KC)
    for passages in chunks if blocks else []:
        grad_KC[passages.rows] = _sum(product(rows, passages) for rows in blocks)
    return grad_KC


class _MaxSim(torch.autograd.Function):
    """Scores of texts that all have rows; `maxsim_scores` sets the others aside."""

    @staticmethod
    def forward(
        ctx: Any,
        query_KC: Tensor,
        passage_KC: Tensor,
        queries_with_rows: _Rows,
        passages_with_rows: _Rows,
        reduction: str,
        chunk: int,
        use_kernel: bool,
    ) -> Tensor:
        dtype, device = accumulation_dtype(query_KC, passage_KC), query_KC.device
        query_lengths, passage_lengths = queries_with_rows.lengths, passages_with_rows.lengths
        query_K, weight_K = _pooling(queries_with_rows, reduction, dtype)
        scores_QP = torch.empty(len(query_lengths), len(passage_lengths), dtype=dtype, device=device)
        # winners are kept only for a backward pass to come
        kept = len(passage_lengths) if any(ctx.needs_input_grad[:2]) else 0
        winner_KP = torch.empty(query_KC.shape[0], kept, dtype=torch.int32, device=device)
        if use_kernel:
            offsets_P1 = passages_with_rows.offsets_N1
            found = best_by_kernel(
                query_KC, passage_KC, query_lengths, passage_lengths, offsets_P1, winner_KP, chunk
            )
        else:
            found = best_by_torch(query_KC, passage_KC, query_lengths, passage_lengths, winner_KP, chunk)
        for queries, passages, best in found:
            best *= weight_K[queries.rows, None]
            sums = best.new_zeros(queries.texts.stop - queries.texts.start, best.shape[1])
            scores_QP[queries.texts, passages.texts] = sums.index_add_(
                0, query_K[queries.rows] - queries.texts.start, best
            )
        ctx.save_for_backward(query_KC, passage_KC, winner_KP, query_K, weight_K)
        ctx.passage_lengths, ctx.chunk, ctx.use_kernel = passage_lengths, chunk, use_kernel
        return scores_QP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QP: Tensor) -> tuple[Tensor | None, ...]:
        query_KC, passage_KC, winner_KP, query_K, weight_K = ctx.saved_tensors
        pairs = _Pairs(
            query_KC=query_KC,
            passage_KC=passage_KC,
            winner_KP=winner_KP,
            query_K=query_K,
            weight_K=weight_K,
            grad_QP=grad_QP,
            use_kernel=ctx.use_kernel,
        )
        num_rows, width = query_KC.shape
        max_rows = rows_widened_at_a_time(ctx.chunk, width, query_KC.is_cuda)
        max_texts = passages_at_a_time(ctx.chunk, num_rows)
        if ctx.use_kernel:
            # it makes no copies and sums in fp32 registers: one block each, so that no partial sum is rounded
            # to 16 bits
            max_rows = max(1, num_rows, passage_KC.shape[0])
            max_texts = max(1, len(ctx.passage_lengths))
        chunks = list(cut_texts(ctx.passage_lengths, max_rows, max_texts))
        # rows narrower than the accumulation are widened a block at a time; others need no copy, and one
        # block is fastest
        step = max(1, num_rows if query_KC.dtype == grad_QP.dtype else min(num_rows, max_rows))
        blocks = [slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step)]
        grad_query = _query_gradients(pairs, blocks, chunks) if ctx.needs_input_grad[0] else None
        grad_passage = _passage_gradients(pairs, blocks, chunks) if ctx.needs_input_grad[1] else None
        return grad_query, grad_passage, None, None, None, None, None


def _with_rows(offsets_N1: Tensor, counts: Sequence[int] | None) -> tuple[_Rows, list[int]]:
    """The texts that have rows, and their positions."""
    if counts is None:
        counts = (offsets_N1[1:] - offsets_N1[:-1]).tolist()
    kept = [text for text, count in enumerate(counts) if count]
    if len(kept) < len(counts):
        # texts between two kept ones have no rows: the offsets of the kept ones stay what they are. Copies an
        # index to the device; a text without rows is only `<s>`, which no tokenizer of ours makes
        offsets_N1 = offsets_N1[torch.tensor([*kept, len(counts)], device=offsets_N1.device)]
    return _Rows([counts[text] for text in kept], offsets_N1), kept


def maxsim_scores(
    query_KC: Tensor,
    query_offsets_Q1: Tensor,
    passage_KC: Tensor,
    passage_offsets_P1: Tensor,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_elements: int | None = None,
    use_kernel: bool | None = None,
    query_counts: Sequence[int] | None = None,
    passage_counts: Sequence[int] | None = None,
) -> Tensor:
    """Multi-vector scores of every query with every passage (arXiv 2402.03216, section 3.2; ColBERT, arXiv
    2004.12832).

    Args:
        query_KC, passage_KC: rows of all texts one after another; bf16 and fp16 are accumulated in fp32.
        query_offsets_Q1, passage_offsets_P1: int64; rows of text n are offsets[n] … offsets[n+1]-1.
        reduction: over a query's rows.
        chunk_elements: entries of the row product held at a time; None: by device.
        use_kernel: find the winners with the Triton kernel; None: where it is installed and meant for the
            device.
        query_counts, passage_counts: rows of each text, where the host knows them; None: read from the
            device.

    Returns:
        scores_QP, fp32 (fp64 for fp64 inputs).
    """
    query_rows, queries = _with_rows(query_offsets_Q1, query_counts)
    passage_rows, passages = _with_rows(passage_offsets_P1, passage_counts)
    chunk = chunk_elements or products_at_a_time(query_KC.is_cuda)
    use_kernel = prefers_kernel(query_KC, passage_KC) if use_kernel is None else use_kernel
    scores = _MaxSim.apply(query_KC, passage_KC, query_rows, passage_rows, reduction, chunk, use_kernel)
    if len(queries) < query_offsets_Q1.shape[0] - 1:
        rows = torch.tensor(queries, dtype=torch.int64, device=scores.device)
        scores = scores.new_zeros(query_offsets_Q1.shape[0] - 1, scores.shape[1]).index_copy(0, rows, scores)
    if len(passages) < passage_offsets_P1.shape[0] - 1:
        columns = torch.tensor(passages, dtype=torch.int64, device=scores.device)
        scores = scores.new_zeros(scores.shape[0], passage_offsets_P1.shape[0] - 1).index_copy(
            1, columns, scores
        )
    return scores
