"""Winners of MaxSim: per (query row, passage), the highest product with one of the passage's rows, and which
row that is.

Two ways to the same numbers: plain torch, which forms the product of all rows in chunks (any device and
type), and a Triton kernel for 16-bit rows on CUDA, which keeps products in registers. Both hand over one
chunk at a time and write the winners as they go.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    # triton takes 70 MB, for which a build of torch for CPUs has no use but the kernel's tests
    if torch.version.cuda is None and os.environ.get("TRITON_INTERPRET") != "1":
        raise ImportError("no CUDA")
    from megam3.scoring.maxsim_triton import best_rows, sum_rows
except ImportError:
    best_rows = sum_rows = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Chunk:
    """Consecutive texts and their rows."""

    texts: slice
    rows: slice


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where a tensor has it."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _product(left: Tensor, right_t: Tensor, dtype: torch.dtype) -> Tensor:
    """left @ right_t with the result and its accumulation in `dtype`."""
    if left.is_cuda and left.dtype == right_t.dtype and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right_t, out_dtype=dtype)
    return left.to(dtype) @ right_t.to(dtype)


def cut_texts(lengths: list[int], max_rows: int, max_texts: int) -> Iterator[Chunk]:
    """Cut texts into runs of at most `max_rows` rows and `max_texts` texts (a longer text is a run of its
    own)."""
    start = first = rows = 0
    for text, length in enumerate(lengths):
        if text > start and (rows + length > max_rows or text - start == max_texts):
            yield Chunk(slice(start, text), slice(first, first + rows))
            start, first, rows = text, first + rows, 0
        rows += length
    if start < len(lengths):
        yield Chunk(slice(start, len(lengths)), slice(first, first + rows))


def _equal_runs(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """(first text, texts) of consecutive texts of one length."""
    start = 0
    for text in range(1, len(lengths) + 1):
        if text == len(lengths) or lengths[text] != lengths[start]:
            yield start, text - start
            start = text


def _segment_max(
    products_KX: Tensor, lengths: list[int], best_KP: Tensor, winner_KP: Tensor | None, first_row: int
) -> None:
    """Write the maximum over each passage's columns, and (unless None) the row that reached it, texts of
    equal length together."""
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


Best = Iterator[tuple[Chunk, Chunk, Tensor]]
"""Queries, passages, and the highest product of each of their (query row, passage) pairs."""


def best_by_torch(
    query_KC: Tensor,
    passage_KC: Tensor,
    query_lengths: list[int],
    passage_lengths: list[int],
    winner_KP: Tensor,
    chunk: int,
) -> Best:
    """Form the row products in chunks; winners go into winner_KP unless it has no columns."""
    dtype, side = accumulation_dtype(query_KC, passage_KC), max(1, int(chunk**0.5))
    for passages in cut_texts(
        passage_lengths, max(1, chunk // min(max(query_KC.shape[0], 1), side)), len(passage_lengths)
    ):
        block_t = passage_KC[passages.rows].T
        lengths = passage_lengths[passages.texts]
        for queries in cut_texts(query_lengths, max(1, chunk // block_t.shape[1]), len(query_lengths)):
            products = _product(query_KC[queries.rows], block_t, dtype)
            best = products.new_empty(products.shape[0], len(lengths))
            winner = winner_KP[queries.rows, passages.texts] if winner_KP.shape[1] else None
            _segment_max(products, lengths, best, winner, passages.rows.start)
            yield queries, passages, best


def best_by_kernel(
    query_KC: Tensor,
    passage_KC: Tensor,
    query_lengths: list[int],
    passage_lengths: list[int],
    offsets_P1: Tensor,
    winner_KP: Tensor,
    chunk: int,
) -> Best:
    """The same by `megam3.scoring.maxsim_triton`, which forms no product in memory: chunks bound the best
    alone. `offsets_P1` are the lengths' on the device."""
    query_KC, passage_KC = query_KC.contiguous(), passage_KC.contiguous()
    every_query = Chunk(slice(0, len(query_lengths)), slice(0, query_KC.shape[0]))
    for passages in cut_texts(
        passage_lengths, passage_KC.shape[0], max(1, chunk // max(query_KC.shape[0], 1))
    ):
        offsets = offsets_P1[passages.texts.start : passages.texts.stop + 1]
        best, winner = best_rows(query_KC, passage_KC, offsets, bool(winner_KP.shape[1]))
        if winner is not None:
            winner_KP[:, passages.texts] = winner
        yield every_query, passages, best


def prefers_kernel(query_KC: Tensor, passage_KC: Tensor) -> bool:
    """Whether the Triton kernel is there and meant for these rows: one 16-bit type, on an NVIDIA device with
    asynchronous copies.

    In fp32 cuBLAS is the better product, so there the torch path stays.
    """
    if best_rows is None or not query_KC.is_cuda or torch.version.cuda is None:
        return False
    same = query_KC.dtype == passage_KC.dtype and query_KC.dtype in (torch.bfloat16, torch.float16)
    return same and torch.cuda.get_device_capability(query_KC.device) >= (8, 0)
