"""MaxSim's two kernels for CUDA, in Triton: the best passage row of each query row, and the sums of the
backward pass.

`megam3.scoring.maxsim` is the reference of both, and their caller.

A program takes ROWS query rows and one passage. It walks over the passage's rows BLOCK at a time, forms their
products in registers and keeps, per query row, the highest so far and its place: the product of all rows with
all rows never reaches memory. One query row e, passage rows a, b, c with BLOCK = 2:

    ⟨e,a⟩ ⟨e,b⟩ = .2 .7 → best .7 at 1          ⟨e,c⟩ = .5 → stays .7 at 1

Rows past the end of the passage are masked to −∞, so nothing outside it can win. NaN counts as +∞: a broken
row gives a score that is not finite, as it does in torch, instead of losing every comparison.

Both directions of the backward pass are one kernel, a product of a sparse matrix in compressed rows with
dense 16-bit rows. A program takes one row of the result, walks over its entries ENTRIES at a time and adds up
value × row in fp32 registers: no row is widened in memory, nothing is added atomically, and the sums have one
order, the same in every run.

    entries (0, .5) (2, 1.) of one row, dense rows a b c   →   .5·a + 1.·c

Tiles are a table by compute capability and width, not a search at run time: a search would run again for
every shape of a batch. For the same reason nothing of a batch's shape is told to Triton's compiler, which
would make another kernel for each number that is 1 or divides by 16, and for each address that does not: what
is compiled depends on the width and the types alone. Importing this module needs triton.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tile:
    """What one program of the forward kernel holds."""

    rows: int
    """Query rows."""
    block: int
    """Passage rows multiplied at a time."""
    width: int
    """Columns of both that are multiplied at a time."""
    warps: int
    stages: int
    """Loads in flight: shared memory holds this many pairs of blocks."""


TILES = {
    (80, 1): Tile(rows=128, block=128, width=64, warps=8, stages=2),
    (80, 256): Tile(rows=128, block=128, width=64, warps=8, stages=3),
    (86, 1): Tile(rows=128, block=128, width=64, warps=8, stages=2),
    (90, 1): Tile(rows=128, block=128, width=64, warps=8, stages=2),
    (90, 256): Tile(rows=128, block=128, width=64, warps=8, stages=4),
}
"""By compute capability × 10 and width of the rows, from which on a tile is used. Up to 255 columns the loop
over them has four turns at most: more than two loads in flight would hold shared memory that a second program
could use. Each fits the shared memory there (tests/scoring). Not timed on a device."""

INTERPRETED = TILES[80, 1]
"""The interpreter has no device, and takes the tile of the oldest."""

ROWS, BLOCK, WIDTH, WARPS = INTERPRETED.rows, INTERPRETED.block, INTERPRETED.width, INTERPRETED.warps

ENTRIES, COLUMNS = 16, 256
"""Tile of a program of the backward kernel: entries added up at a time, and columns of the result."""


def tile_for(capability: tuple[int, int], width: int) -> Tile:
    """The tile for rows of this width on a device of this compute capability.

    >>> tile_for((8, 9), 1024) == TILES[86, 1], tile_for((10, 0), 1024) == TILES[90, 256]
    (True, True)
    """
    device = capability[0] * 10 + capability[1]
    served = max((known for known, _ in TILES if known <= device), default=80)
    return TILES[max(key for key in TILES if key[0] == served and key[1] <= max(width, 1))]


@triton.jit(
    do_not_specialize=["num_query_rows", "num_passages"],
    do_not_specialize_on_alignment=["offsets_P1", "best_KP", "winner_KP"],
)
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
        tile = INTERPRETED
        if query_KC.is_cuda:
            tile = tile_for(torch.cuda.get_device_capability(query_KC.device), query_KC.shape[1])
        grid = (triton.cdiv(num_rows, tile.rows) * num_passages,)
        shape = (num_rows, query_KC.shape[1], num_passages)
        _best_rows[grid](
            query_KC,
            passage_KC,
            offsets_P1,
            best_KP,
            winner_KP,
            *shape,
            keep_winners,
            tile.rows,
            tile.block,
            tile.width,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return best_KP, winner_KP if keep_winners else None


@triton.jit(do_not_specialize_on_alignment=["crow_R1", "columns_E", "values_E"])
def _sum_rows(
    crow_R1,
    columns_E,
    values_E,
    dense_XC,
    result_RC,
    width,
    ENTRIES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < width
    first, stop = tl.load(crow_R1 + row), tl.load(crow_R1 + row + 1)
    total = tl.zeros((COLUMNS,), tl.float32)
    for begin in range(first, stop, ENTRIES):
        entry = begin + tl.arange(0, ENTRIES)
        is_entry = entry < stop
        source = tl.load(columns_E + entry, mask=is_entry, other=0).to(tl.int64)
        value = tl.load(values_E + entry, mask=is_entry, other=0.0)
        rows = tl.load(
            dense_XC + source[:, None] * width + column[None, :],
            mask=is_entry[:, None] & is_column[None, :],
            other=0.0,
        )
        total += tl.sum(rows.to(tl.float32) * value[:, None], axis=0)
    target = result_RC + row * width + column
    tl.store(target, total.to(result_RC.dtype.element_ty), mask=is_column)


def sum_rows(crow_R1: Tensor, columns_E: Tensor, values_E: Tensor, dense_XC: Tensor) -> Tensor:
    """Row r of the result: Σ values[e] · dense[columns[e]] over its entries e = crow[r] … crow[r+1]-1; rows
    without any are 0.

    Args:
        crow_R1, columns_E: int32 or int64.
        values_E: fp32.
        dense_XC: contiguous, bf16, fp16 or fp32.

    Returns:
        [R, C] in the dtype of `dense_XC`, accumulated in fp32.
    """
    num_rows, width = crow_R1.shape[0] - 1, dense_XC.shape[1]
    result_RC = dense_XC.new_empty(num_rows, width)
    if result_RC.numel():
        grid = (num_rows, triton.cdiv(width, COLUMNS))
        _sum_rows[grid](
            crow_R1, columns_E, values_E, dense_XC, result_RC, width, ENTRIES, COLUMNS, num_warps=4
        )
    return result_RC
