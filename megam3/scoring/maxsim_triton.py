"""The best passage row of each query row in one Triton kernel, for CUDA; `megam3.scoring.maxsim` is its reference and its caller.

A program takes ROWS query rows and one passage. It walks over the passage's rows BLOCK at a time, forms their products in registers and
keeps, per query row, the highest so far and its place: the product of all rows with all rows never reaches memory. One query row e,
passage rows a, b, c with BLOCK = 2:

    ⟨e,a⟩ ⟨e,b⟩ = .2 .7 → best .7 at 1          ⟨e,c⟩ = .5 → stays .7 at 1

Rows past the end of the passage are masked to −∞, so nothing outside it can win. NaN counts as +∞: a broken row gives a score that is not
finite, as it does in torch, instead of losing every comparison. Importing this module needs triton.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, BLOCK, WIDTH = 128, 128, 64
"""Tile of a program: query rows, passage rows, and columns of both that are multiplied at a time."""
WARPS = 8
"""Of a program; with this tile no register spills on compute capabilities 8.0 to 10.0."""


@triton.jit
def _best_rows(
    query_KC,
    passage_KC,
    offsets_P1,
    best_KP,
    winner_KP,
    num_query_rows,
    width,
    num_passages,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    # neighbouring programs share a passage, whose rows then come from the cache
    num_blocks = tl.cdiv(num_query_rows, ROWS)
    passage = tl.program_id(0) // num_blocks
    row = tl.program_id(0) % num_blocks * ROWS + tl.arange(0, ROWS)
    is_row = row < num_query_rows
    first, stop = tl.load(offsets_P1 + passage), tl.load(offsets_P1 + passage + 1)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    winner = tl.zeros((ROWS,), tl.int32) + first.to(tl.int32)
    query_start = query_KC + row.to(tl.int64)[:, None] * width
    for begin in range(first, stop, BLOCK):
        place = begin + tl.arange(0, BLOCK)
        is_place = place < stop
        passage_start = passage_KC + place.to(tl.int64)[None, :] * width
        products = tl.zeros((ROWS, BLOCK), tl.float32)
        for start in range(0, width, WIDTH):
            column = start + tl.arange(0, WIDTH)
            is_column = column < width
            left = tl.load(
                query_start + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0.0
            )
            right = tl.load(
                passage_start + column[:, None], mask=is_column[:, None] & is_place[None, :], other=0.0
            )
            products = tl.dot(left, right, products, input_precision="ieee")
        products = tl.where(products == products, products, float("inf"))
        products = tl.where(is_place[None, :], products, float("-inf"))
        highest, index = tl.max(products, axis=1, return_indices=True)
        winner = tl.where(highest > best, (begin + index).to(tl.int32), winner)
        best = tl.maximum(best, highest)
    target = row.to(tl.int64) * num_passages + passage
    tl.store(best_KP + target, best, mask=is_row)
    if KEEP:
        tl.store(winner_KP + target, winner, mask=is_row)


def best_rows(
    query_KC: Tensor, passage_KC: Tensor, offsets_P1: Tensor, keep_winners: bool
) -> tuple[Tensor, Tensor | None]:
    """For every query row and passage: the highest product with a row of the passage, and which row that is.

    Args:
        query_KC, passage_KC: contiguous rows, bf16, fp16 or fp32.
        offsets_P1: int64; rows of passage n are offsets[n] … offsets[n+1]-1 of passage_KC, at least one each.
        keep_winners: whether the rows are wanted; without a backward pass they are not.

    Returns:
        best_KP, fp32, accumulated in fp32; and winner_KP, int32, the first of equals (None unless wanted).
    """
    num_rows, num_passages = query_KC.shape[0], offsets_P1.shape[0] - 1
    best_KP = torch.empty(num_rows, num_passages, dtype=torch.float32, device=query_KC.device)
    winner_KP = torch.empty(
        best_KP.shape if keep_winners else (0,), dtype=torch.int32, device=query_KC.device
    )
    if best_KP.numel():
        grid = (triton.cdiv(num_rows, ROWS) * num_passages,)
        shape = (num_rows, query_KC.shape[1], num_passages)
        _best_rows[grid](
            query_KC,
            passage_KC,
            offsets_P1,
            best_KP,
            winner_KP,
            *shape,
            keep_winners,
            ROWS,
            BLOCK,
            WIDTH,
            num_warps=WARPS,
        )
    return best_KP, winner_KP if keep_winners else None
