"""MaxSim over ragged rows: for each query row its best passage row, then a mean (or sum) over the query's rows.

    s(q, p) = (1/|q|) Σ_i max_j ⟨E_q[i], E_p[j]⟩          j runs over the rows the passage HAS: there is no padding that could win the max

The product of all query rows with all passage rows is formed in chunks and dropped at once; what stays for the backward pass is one int32
per (query row, passage): which row won. With A the sparse [query rows, passage rows] matrix of the pair's gradient at each winner,

    ∂E_q = A · E_p          ∂E_p = Aᵀ · E_q

two sparse-dense products, 1/L of the forward product's work each. Worked example, one query row e and passages of 2 and 1 rows: products
[0.1, 0.7 | 0.3] → scores [0.7, 0.3], winners [1, 2], and A has the two gradients at columns 1 and 2.

A text without rows (only `<s>` was in it) scores 0 with everything and receives no gradient.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megam3.scoring.sparse import csr_product, transposed_csr

CHUNK_ELEMENTS_CPU = 1 << 20
"""Entries of the product held at a time on a CPU: 4 MB in fp32, which stays in cache until the max has read it."""
CHUNK_ELEMENTS_CUDA = 1 << 26
"""The same on CUDA: 256 MB, large enough to fill the device."""


@dataclass(frozen=True)
class _Chunk:
    """Consecutive texts and their rows."""

    texts: slice
    rows: slice


def _accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _product(left: Tensor, right_t: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right_t with the result and its accumulation in `dtype`."""
    if left.is_cuda and left.dtype == right_t.dtype and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right_t, out_dtype=dtype)
    return left.to(dtype) @ right_t.to(dtype)


def _chunks(lengths: list[int], max_rows: int, max_texts: int) -> Iterator[_Chunk]:
    """Cut texts into runs of at most `max_rows` rows and `max_texts` texts (a longer text is a run of its own)."""
    start = first = rows = 0
    for text, length in enumerate(lengths):
        if text > start and (rows + length > max_rows or text - start == max_texts):
            yield _Chunk(slice(start, text), slice(first, first + rows))
            start, first, rows = text, first + rows, 0
        rows += length
    if start < len(lengths):
        yield _Chunk(slice(start, len(lengths)), slice(first, first + rows))


def _equal_runs(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """(first text, texts) of consecutive texts of one length."""
    start = 0
    for text in range(1, len(lengths) + 1):
        if text == len(lengths) or lengths[text] != lengths[start]:
            yield start, text - start
            start = text


def _segment_max(products_KX: Tensor, lengths: list[int], best_KP: Tensor, winner_KP: Tensor | None, first_row: int) -> None:
    """Write the maximum over each passage's columns, and (unless None) the row that reached it, texts of equal length together."""
    column = 0
    for start, count in _equal_runs(lengths):
        length = lengths[start]
        view = products_KX[:, column : column + count * length].unflatten(1, (count, length))
        column += count * length
        if winner_KP is None:
            best_KP[:, start : start + count] = view.amax(dim=2)
            continue
        best_KP[:, start : start + count], winner = view.max(dim=2)
        begins = first_row + column + length * torch.arange(-count, 0, device=winner.device)
        winner_KP[:, start : start + count] = winner + begins


def _pooling(query_lengths: list[int], reduction: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Query of each row and the weight it enters the query's score with: 1, or 1/|q| for the mean."""
    lengths = torch.tensor(query_lengths, dtype=torch.int64, device=device)
    query_K = torch.repeat_interleave(torch.arange(len(query_lengths), device=device), lengths, output_size=sum(query_lengths))
    if reduction == "sum":
        return query_K, torch.ones(query_K.shape[0], dtype=dtype, device=device)
    return query_K, lengths.to(dtype).reciprocal()[query_K]


class _MaxSim(torch.autograd.Function):
    """Scores of texts that all have rows; `maxsim_scores` sets the others aside."""

    @staticmethod
    def forward(
        ctx: Any, query_KC: Tensor, passage_KC: Tensor, query_lengths: list[int], passage_lengths: list[int], reduction: str, chunk: int
    ) -> Tensor:
        dtype, device = _accumulation_dtype(query_KC, passage_KC), query_KC.device
        query_K, weight_K = _pooling(query_lengths, reduction, dtype, device)
        scores_QP = torch.empty(len(query_lengths), len(passage_lengths), dtype=dtype, device=device)
        # winners are kept only for a backward pass to come
        kept = len(passage_lengths) if any(ctx.needs_input_grad[:2]) else 0
        winner_KP = torch.empty(query_KC.shape[0], kept, dtype=torch.int32, device=device)
        side = max(1, int(chunk**0.5))
        for passages in _chunks(passage_lengths, max(1, chunk // min(max(query_KC.shape[0], 1), side)), len(passage_lengths)):
            block_t = passage_KC[passages.rows].T
            lengths = passage_lengths[passages.texts]
            for queries in _chunks(query_lengths, max(1, chunk // block_t.shape[1]), len(query_lengths)):
                products = _product(query_KC[queries.rows], block_t, dtype)
                best = products.new_empty(products.shape[0], len(lengths))
                winner = winner_KP[queries.rows, passages.texts] if kept else None
                _segment_max(products, lengths, best, winner, passages.rows.start)
                best *= weight_K[queries.rows, None]
                sums = best.new_zeros(queries.texts.stop - queries.texts.start, len(lengths))
                scores_QP[queries.texts, passages.texts] = sums.index_add_(0, query_K[queries.rows] - queries.texts.start, best)
        ctx.save_for_backward(query_KC, passage_KC, winner_KP, query_K, weight_K)
        ctx.passage_lengths, ctx.chunk = passage_lengths, chunk
        return scores_QP

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QP: Tensor) -> tuple[Tensor | None, ...]:
        query_KC, passage_KC, winner_KP, query_K, weight_K = ctx.saved_tensors
        dtype, width = grad_QP.dtype, query_KC.shape[1]
        query_rows = query_KC.to(dtype)
        grad_query = torch.zeros_like(query_rows)
        grad_passage = torch.empty_like(passage_KC)
        # per passage chunk: a float copy of its rows, and a coefficient and its place per (query row, passage)
        max_rows, max_texts = max(1, 4 * ctx.chunk // max(width, 1)), max(1, ctx.chunk // max(query_KC.shape[0], 1))
        for passages in _chunks(ctx.passage_lengths, max_rows, max_texts):
            columns = (winner_KP[:, passages.texts] - passages.rows.start).contiguous()
            coefficients = grad_QP[:, passages.texts].index_select(0, query_K) * weight_K[:, None]
            num_rows = passages.rows.stop - passages.rows.start
            if ctx.needs_input_grad[0]:
                crow = torch.arange(columns.shape[0] + 1, dtype=torch.int32, device=columns.device) * columns.shape[1]
                grad_query += csr_product(crow, columns.flatten(), coefficients.flatten(), passage_KC[passages.rows].to(dtype))
            if ctx.needs_input_grad[1]:
                crow, rows, values = transposed_csr(columns, coefficients, num_rows)
                grad_passage[passages.rows] = csr_product(crow, rows, values, query_rows).to(passage_KC.dtype)
        return grad_query.to(query_KC.dtype), grad_passage, None, None, None, None


def _with_rows(offsets_N1: Tensor) -> tuple[list[int], list[int]]:
    """Lengths of the texts that have rows, and their positions."""
    lengths = (offsets_N1[1:] - offsets_N1[:-1]).tolist()
    kept = [text for text, length in enumerate(lengths) if length]
    return [lengths[text] for text in kept], kept


def maxsim_scores(
    query_KC: Tensor,
    query_offsets_Q1: Tensor,
    passage_KC: Tensor,
    passage_offsets_P1: Tensor,
    reduction: Literal["mean", "sum"] = "mean",
    chunk_elements: int | None = None,
) -> Tensor:
    """Multi-vector scores of every query with every passage (arXiv 2402.03216, section 3.2; ColBERT, arXiv 2004.12832).

    Args:
        query_KC, passage_KC: rows of all texts one after another; bf16 and fp16 are accumulated in fp32.
        query_offsets_Q1, passage_offsets_P1: int64; rows of text n are offsets[n] … offsets[n+1]-1.
        reduction: over a query's rows.
        chunk_elements: entries of the row product held at a time; None: by device.

    Returns:
        scores_QP, fp32 (fp64 for fp64 inputs).
    """
    query_lengths, queries = _with_rows(query_offsets_Q1)
    passage_lengths, passages = _with_rows(passage_offsets_P1)
    chunk = chunk_elements or (CHUNK_ELEMENTS_CUDA if query_KC.is_cuda else CHUNK_ELEMENTS_CPU)
    scores = _MaxSim.apply(query_KC, passage_KC, query_lengths, passage_lengths, reduction, chunk)
    if len(queries) < query_offsets_Q1.shape[0] - 1:
        rows = torch.tensor(queries, dtype=torch.int64, device=scores.device)
        scores = scores.new_zeros(query_offsets_Q1.shape[0] - 1, scores.shape[1]).index_copy(0, rows, scores)
    if len(passages) < passage_offsets_P1.shape[0] - 1:
        columns = torch.tensor(passages, dtype=torch.int64, device=scores.device)
        scores = scores.new_zeros(scores.shape[0], passage_offsets_P1.shape[0] - 1).index_copy(1, columns, scores)
    return scores
