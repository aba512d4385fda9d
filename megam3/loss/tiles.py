"""All ranks' queries × this rank's passages, tile by tile: sums over columns that are never held, and their
gradient.

Per query, over every rank's columns outside the query's own group,

    lse_h    log Σ exp(s_h/τ)
    mean_h   Σ t · s_h/τ,  t = exp(s_sum/τ − lse_sum)     (a second pass, while distilling: t needs lse_sum)

Ranks exchange these few numbers per query instead of columns of scores. With u and v the gradients of lse_h
and mean_h, the backward pass forms each tile again and hands the heads' own backward functions

    ∂s_h = (u · exp(s_h/τ − lse_h) + v · t) / τ             (the target t carries no gradient)

Worked example, two ranks with one query each and tiles of one text: rank 0 holds passages 0 and 1, rank 1
holds 2 and 3, query 0 owns passage 0 and query 1 owns passage 2. Rank 0 visits (q0, p0) hidden, (q1, p0),
(q0, p1), (q1, p1); rank 1 the other four. Each adds exp(s) to the sums of both queries; one all-reduce makes
them whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megam3.batch import Representations
from megam3.dist import comm
from megam3.dist.gather import gather_rows
from megam3.loss.negatives import Negatives
from megam3.loss.settings import LossSettings
from megam3.scoring.combine import Scores, score_heads


@dataclass(frozen=True, kw_only=True)
class Tile:
    """Some queries against some of this rank's passages."""

    rows: slice
    columns: slice
    """Among all ranks' passages."""
    query_tile: int
    passage_tile: int


@dataclass(frozen=True)
class TileLogits:
    """One tile, without graph."""

    by_name: dict[str, Tensor]
    """Scores over τ, hidden columns at the lowest number."""
    hidden_QP: Tensor
    """bool: not visible, above the margin's limit, or of the query's own group."""


@dataclass(frozen=True, kw_only=True)
class TileGrid:
    """Every tile, and what is needed to score and mask it."""

    query_tiles: list[Representations]
    passage_tiles: list[Representations]
    negatives: Negatives
    """Rows are all ranks' queries, columns all ranks' passages."""
    first_column: int
    """Column of this rank's first passage."""
    limit_Q: Tensor | None
    """Highest combined score a column may have (margin rule)."""
    settings: LossSettings

    def tiles(self) -> Iterator[Tile]:
        """All pairs of tiles that hold a score, passages outermost: a tile of passages is read once, queries
        often."""
        column = self.first_column
        for p, passages in enumerate(self.passage_tiles):
            row = 0
            for q, queries in enumerate(self.query_tiles):
                if queries.num_texts and passages.num_texts:
                    yield Tile(
                        rows=slice(row, row + queries.num_texts),
                        columns=slice(column, column + passages.num_texts),
                        query_tile=q,
                        passage_tile=p,
                    )
                row += queries.num_texts
            column += passages.num_texts

    def logits(self, tile: Tile, scores: Scores | None = None) -> TileLogits:
        """Logits of a tile; `scores` where it has been scored already."""
        if scores is None:
            queries, passages = self.query_tiles[tile.query_tile], self.passage_tiles[tile.passage_tile]
            scores = score_settings_heads(queries, passages, self.settings)
        hidden_QP = ~self.negatives.visible(tile.rows, tile.columns)
        # own groups are scored once with a graph (tiled.py): counted here too, they would enter twice
        hidden_QP |= self.negatives.in_own_group(tile.rows, tile.columns)
        if self.limit_Q is not None and scores.sum_QP is not None:
            hidden_QP |= scores.sum_QP.detach() > self.limit_Q[tile.rows, None]
        tau = self.settings.temperatures
        named = {name: x.detach() / tau[name] for name, x in scores.by_name().items()}
        masked = {name: x.masked_fill_(hidden_QP, torch.finfo(x.dtype).min) for name, x in named.items()}
        return TileLogits(masked, hidden_QP)


@dataclass(frozen=True)
class OutsideGroup:
    """What this rank's queries see outside their own groups; H scores, D distilled heads, in the settings'
    order."""

    lse_HQ: Tensor
    mean_DQ: Tensor
    """No rows while not distilling."""
    highest_HQ: Tensor
    """Highest logit; has no gradient."""


def score_settings_heads(
    queries: Representations, passages: Representations, settings: LossSettings
) -> Scores:
    """Scores of some queries with some passages, of the heads these settings need; no rank is asked."""
    return score_heads(queries, passages, settings.sum_weights, settings.maxsim, settings.heads)


def _log_sums(grid: TileGrid) -> tuple[Tensor, Tensor]:
    """(lse, highest logit) of every score and query over all ranks' columns, each [H, Q]; one pass over the
    tiles.

    A running maximum keeps every exponential at most 1; a later, higher tile rescales what was summed before
    it.
    """
    like = grid.query_tiles[0].dense_ND
    dtype = torch.promote_types(like.dtype, torch.float32)
    num_queries = sum(tile.num_texts for tile in grid.query_tiles)
    lowest = torch.finfo(dtype).min
    top_HQ = torch.full((len(grid.settings.scores), num_queries), lowest, dtype=dtype, device=like.device)
    total_HQ = torch.zeros_like(top_HQ)
    for tile in grid.tiles():
        logits = grid.logits(tile).by_name
        for index, name in enumerate(grid.settings.scores):
            higher_Q = torch.maximum(top_HQ[index, tile.rows], logits[name].amax(1))
            total_HQ[index, tile.rows] *= (top_HQ[index, tile.rows] - higher_Q).exp()
            total_HQ[index, tile.rows] += logits[name].sub_(higher_Q[:, None]).exp_().sum(1)
            top_HQ[index, tile.rows] = higher_Q
    highest_HQ = comm.all_reduce_max(top_HQ)
    total_HQ = comm.all_reduce_sum(total_HQ * (top_HQ - highest_HQ).exp())
    # a query that sees nothing outside its group summed the lowest numbers themselves: its log-sum-exp stays
    # that low
    lse_HQ = torch.where(highest_HQ > lowest, highest_HQ + total_HQ.clamp(min=1.0).log(), highest_HQ)
    return lse_HQ, highest_HQ


def _target_means(grid: TileGrid, lse_HQ: Tensor) -> Tensor:
    """mean_h of every distilled head and query over all ranks' columns, [D, Q]; a second pass over the
    tiles."""
    heads = grid.settings.distilled
    lse_of_sum_Q = lse_HQ[grid.settings.scores.index("sum")]
    mean_DQ = lse_HQ.new_zeros(len(heads), lse_HQ.shape[1])
    for tile in grid.tiles():
        logits = grid.logits(tile)
        target_QP = logits.by_name["sum"].sub_(lse_of_sum_Q[tile.rows, None]).exp_()
        target_QP.masked_fill_(logits.hidden_QP, 0.0)
        for index, head in enumerate(heads):
            mean_DQ[index, tile.rows] += (target_QP * logits.by_name[head]).sum(1)
    return comm.all_reduce_sum(mean_DQ)


def _tile_gradients(
    grid: TileGrid, tile: Tile, lse_HQ: Tensor, grad_lse_HQ: Tensor, grad_mean_DQ: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of one tile to its queries' and its passages' floats."""
    queries, passages = grid.query_tiles[tile.query_tile], grid.passage_tiles[tile.passage_tile]
    leaves = [x.detach().requires_grad_() for part in (queries, passages) for x in part.floats()]
    with torch.enable_grad():
        scores = score_settings_heads(
            queries.with_floats(*leaves[:3]), passages.with_floats(*leaves[3:]), grid.settings
        )
    logits = grid.logits(tile, scores)
    rows, names = tile.rows, grid.settings.scores
    # in place: a tile's logits are this function's own
    probabilities = {
        name: logits.by_name[name].sub_(lse_HQ[index, rows, None]).exp_().masked_fill_(logits.hidden_QP, 0.0)
        for index, name in enumerate(names)
    }
    outputs, upstream = [], []
    for index, name in enumerate(names):
        scale = 1.0 / grid.settings.temperatures[name]
        grad_QP = probabilities[name] * (grad_lse_HQ[index, rows, None] * scale)
        if grad_mean_DQ.shape[0] and name in grid.settings.distilled:
            on_mean_Q = grad_mean_DQ[grid.settings.distilled.index(name), rows] * scale
            grad_QP.addcmul_(probabilities["sum"], on_mean_Q[:, None].expand_as(grad_QP))
        outputs.append(scores.by_name()[name])
        upstream.append(grad_QP)
    return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)


@dataclass(frozen=True)
class _SideGradients:
    """Gradients of one side: a zero tensor per float, and views of it per tile, so that tiles add in
    place."""

    whole: list[Tensor]
    per_tile: list[tuple[Tensor, ...]]

    @staticmethod
    def zeros(tiles: list[Representations]) -> "_SideGradients":
        columns = list(zip(*(tile.floats() for tile in tiles)))
        sizes = [[x.shape[0] for x in column] for column in columns]
        whole = [column[0].new_zeros(sum(rows), *column[0].shape[1:]) for column, rows in zip(columns, sizes)]
        return _SideGradients(whole, list(zip(*(x.split(rows) for x, rows in zip(whole, sizes)))))


class _OutsideGroup(torch.autograd.Function):
    """(lse, mean, highest) of this rank's queries over columns outside each query's group; see
    OutsideGroup."""

    @staticmethod
    def forward(
        ctx: Any, grid: TileGrid, counts: tuple[int, ...], distill: bool, *floats: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse_HQ, highest_HQ = _log_sums(grid)
        mean_DQ = _target_means(grid, lse_HQ) if distill else lse_HQ.new_zeros(0, lse_HQ.shape[1])
        # the grid holds views of what the caller keeps anyway; only the sums are new
        ctx.grid, ctx.counts = grid, counts
        ctx.save_for_backward(lse_HQ)
        first = sum(counts[: comm.rank()])
        own = slice(first, first + counts[comm.rank()])
        highest_own_HQ = highest_HQ[:, own].clone()
        ctx.mark_non_differentiable(highest_own_HQ)
        return lse_HQ[:, own].clone(), mean_DQ[:, own].clone(), highest_own_HQ

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_lse: Tensor, grad_mean: Tensor, _grad_highest: Tensor
    ) -> tuple[Tensor | None, ...]:
        (lse_HQ,), grid = ctx.saved_tensors, ctx.grid
        # passages of every rank took part in every query's numbers: their gradients are every rank's to use
        upstream = gather_rows(torch.cat([grad_lse, grad_mean]).T.contiguous(), ctx.counts).T
        num_scores = lse_HQ.shape[0]
        of_queries = _SideGradients.zeros(grid.query_tiles)
        of_passages = _SideGradients.zeros(grid.passage_tiles)
        for tile in grid.tiles():
            found = _tile_gradients(grid, tile, lse_HQ, upstream[:num_scores], upstream[num_scores:])
            totals = (*of_queries.per_tile[tile.query_tile], *of_passages.per_tile[tile.passage_tile])
            for total, grad in zip(totals, found):
                if grad is not None:
                    total += grad
        return None, None, None, *of_queries.whole, *of_passages.whole


def sum_outside_group(
    grid: TileGrid,
    counts: tuple[int, ...],
    distill: bool,
    queries: Representations,
    passages: Representations,
) -> OutsideGroup:
    """What this rank's queries see outside their own groups, over all ranks' passages; collective,
    differentiable.

    Args:
        grid: tiles of `queries` and `passages`, without graph.
        counts: queries of each rank.
        distill: pass a second time for the means.
        queries: all ranks', gathered with their graph.
        passages: this rank's.
    """
    return OutsideGroup(*_OutsideGroup.apply(grid, counts, distill, *queries.floats(), *passages.floats()))
