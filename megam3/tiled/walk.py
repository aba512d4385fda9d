"""Tiles of ALL ranks' queries × this rank's passages: what a softmax needs from columns it never holds, and the gradient through it.

Per query, over every rank's columns outside the query's own group,

    lse_h    log Σ exp(s_h/τ)
    mean_h   Σ t · s_h/τ,  t = exp(s_sum/τ − lse_sum)        (a second walk, while distilling: t needs lse_sum)

Ranks join these few numbers per query instead of columns of scores. With u and v the gradients of lse_h and mean_h, the backward walk forms
each tile again and hands the heads' own backward functions

    ∂s_h = (u · exp(s_h/τ − lse_h) + v · t) / τ             (the target t carries no gradient)
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megam3.batch import Representations
from megam3.candidates import Candidates
from megam3.dist import comm
from megam3.dist.gather import gather_rows
from megam3.losses import LossSettings
from megam3.scoring.combine import Scores, score_heads


@dataclass(frozen=True)
class Tile:
    """Some queries against some of this rank's passages."""

    rows: slice
    columns: slice
    """Among all ranks' passages."""
    query_tile: int
    passage_tile: int


@dataclass(frozen=True)
class Walk:
    """Every tile, and what it needs to know."""

    query_tiles: list[Representations]
    passage_tiles: list[Representations]
    candidates: Candidates
    """Rows are all ranks' queries, columns all ranks' passages."""
    first_column: int
    """Column of this rank's first passage."""
    limit_Q: Tensor | None
    """Highest combined score a column may have (margin rule)."""
    settings: LossSettings
    maxsim: Literal["mean", "sum"]

    @property
    def names(self) -> list[str]:
        """Scores formed in every tile, in order."""
        return [*self.settings.heads, *(["sum"] if self.settings.sum_weights is not None else [])]

    def tiles(self) -> Iterator[Tile]:
        """All pairs of tiles that hold a score, passages outermost."""
        column = self.first_column
        for p, passages in enumerate(self.passage_tiles):
            row = 0
            for q, queries in enumerate(self.query_tiles):
                if queries.num_texts and passages.num_texts:
                    yield Tile(
                        slice(row, row + queries.num_texts), slice(column, column + passages.num_texts), q, p
                    )
                row += queries.num_texts
            column += passages.num_texts

    def score(self, queries: Representations, passages: Representations) -> Scores:
        """Scores of some queries with some passages."""
        return score_heads(queries, passages, self.settings.sum_weights, self.maxsim, self.settings.heads)

    def logits(self, tile: Tile, scores: Scores) -> tuple[dict[str, Tensor], Tensor]:
        """Scores over τ without graph, hidden columns at the lowest number; and what is hidden: not allowed, too high, or of the own group.

        Returns:
            logits by name, and hidden_QP.
        """
        hidden = ~self.candidates.allowed(tile.rows, tile.columns)
        column_P = torch.arange(tile.columns.start, tile.columns.stop, device=hidden.device)
        start_Q1, stop_Q1 = (
            self.candidates.positive_column_Q[tile.rows, None],
            self.candidates.group_stop_Q[tile.rows, None],
        )
        hidden |= (column_P >= start_Q1) & (column_P < stop_Q1)
        if self.limit_Q is not None and scores.sum_QP is not None:
            hidden |= scores.sum_QP.detach() > self.limit_Q[tile.rows, None]
        named = {name: x.detach() / self.settings.temperature for name, x in scores.by_name().items()}
        return {name: x.masked_fill_(hidden, torch.finfo(x.dtype).min) for name, x in named.items()}, hidden

    def tile_logits(self, tile: Tile) -> tuple[dict[str, Tensor], Tensor]:
        """Score a tile, then `logits`."""
        return self.logits(
            tile, self.score(self.query_tiles[tile.query_tile], self.passage_tiles[tile.passage_tile])
        )


def _log_sums(walk: Walk) -> tuple[Tensor, Tensor]:
    """(lse, highest logit) of every score and query over all ranks' columns, each [scores, Q]."""
    like = walk.query_tiles[0].dense_ND
    dtype, num_queries = (
        torch.promote_types(like.dtype, torch.float32),
        sum(tile.num_texts for tile in walk.query_tiles),
    )
    lowest = torch.finfo(dtype).min
    top = torch.full((len(walk.names), num_queries), lowest, dtype=dtype, device=like.device)
    total = torch.zeros_like(top)
    for tile in walk.tiles():
        logits, _ = walk.tile_logits(tile)
        for index, name in enumerate(walk.names):
            higher = torch.maximum(top[index, tile.rows], logits[name].amax(1))
            total[index, tile.rows] *= (top[index, tile.rows] - higher).exp()
            total[index, tile.rows] += logits[name].sub_(higher[:, None]).exp_().sum(1)
            top[index, tile.rows] = higher
    highest = comm.all_reduce_max(top)
    total = comm.all_reduce_sum(total * (top - highest).exp())
    # a query that sees nothing outside its group summed the lowest numbers themselves: its log-sum-exp stays that low
    return torch.where(highest > lowest, highest + total.clamp(min=1.0).log(), highest), highest


def _target_means(walk: Walk, lse: Tensor) -> Tensor:
    """mean_h of every distilled head and query over all ranks' columns, [heads, Q]."""
    heads, of_sum = walk.settings.distilled, lse[walk.names.index("sum")]
    means = lse.new_zeros(len(heads), lse.shape[1])
    for tile in walk.tiles():
        logits, hidden = walk.tile_logits(tile)
        target = logits["sum"].sub_(of_sum[tile.rows, None]).exp_().masked_fill_(hidden, 0.0)
        for index, head in enumerate(heads):
            means[index, tile.rows] += (target * logits[head]).sum(1)
    return comm.all_reduce_sum(means)


def _tile_gradients(
    walk: Walk, tile: Tile, lse: Tensor, on_lse: Tensor, on_mean: Tensor
) -> tuple[Tensor | None, ...]:
    """Gradients of one tile to its queries' and its passages' floats."""
    parts = walk.query_tiles[tile.query_tile], walk.passage_tiles[tile.passage_tile]
    leaves = [x.detach().requires_grad_() for part in parts for x in part.floats()]
    with torch.enable_grad():
        scores = walk.score(parts[0].with_floats(*leaves[:3]), parts[1].with_floats(*leaves[3:]))
    logits, hidden = walk.logits(tile, scores)
    scale, rows = 1.0 / walk.settings.temperature, tile.rows
    probabilities = {
        name: logits[name].sub_(lse[index, rows, None]).exp_().masked_fill_(hidden, 0.0)
        for index, name in enumerate(walk.names)
    }
    outputs, upstream = [], []
    for index, name in enumerate(walk.names):
        grad = probabilities[name] * (on_lse[index, rows, None] * scale)
        if on_mean.shape[0] and name in walk.settings.distilled:
            grad.addcmul_(
                probabilities["sum"],
                (on_mean[walk.settings.distilled.index(name), rows, None] * scale).expand_as(grad),
            )
        outputs.append(scores.by_name()[name])
        upstream.append(grad)
    return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)


def _zero_gradients(tiles: list[Representations]) -> tuple[list[Tensor], list[tuple[Tensor, ...]]]:
    """One zero tensor per float of a whole side, and views of them per tile: tiles add into what is returned, with no copy at the end."""
    columns = list(zip(*(tile.floats() for tile in tiles)))
    rows = [[x.shape[0] for x in column] for column in columns]
    wholes = [column[0].new_zeros(sum(sizes), *column[0].shape[1:]) for column, sizes in zip(columns, rows)]
    return wholes, list(zip(*(whole.split(sizes) for whole, sizes in zip(wholes, rows))))


class _OutsideGroup(torch.autograd.Function):
    """(lse [scores, own queries], mean [heads, own queries], highest [scores, own queries]) over columns outside each query's group."""

    @staticmethod
    def forward(
        ctx: Any, walk: Walk, counts: tuple[int, ...], distill: bool, *floats: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse, highest = _log_sums(walk)
        means = _target_means(walk, lse) if distill else lse.new_zeros(0, lse.shape[1])
        ctx.walk, ctx.counts = walk, counts
        ctx.save_for_backward(lse)
        first = sum(counts[: comm.rank()])
        own = slice(first, first + counts[comm.rank()])
        highest_own = highest[:, own].clone()
        ctx.mark_non_differentiable(highest_own)
        return lse[:, own].clone(), means[:, own].clone(), highest_own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_lse: Tensor, grad_mean: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (lse,), walk = ctx.saved_tensors, ctx.walk
        # the passages of every rank took part in every query's numbers: their gradients are everybody's to use
        upstream = gather_rows(torch.cat([grad_lse, grad_mean]).T.contiguous(), ctx.counts).T
        on_lse, on_mean = upstream[: lse.shape[0]], upstream[lse.shape[0] :]
        (of_queries, query_parts), (of_passages, passage_parts) = map(
            _zero_gradients, (walk.query_tiles, walk.passage_tiles)
        )
        for tile in walk.tiles():
            found = _tile_gradients(walk, tile, lse, on_lse, on_mean)
            for total, grad in zip([*query_parts[tile.query_tile], *passage_parts[tile.passage_tile]], found):
                if grad is not None:
                    total += grad
        return None, None, None, *of_queries, *of_passages


def outside_group(
    walk: Walk, counts: tuple[int, ...], distill: bool, queries: Representations, passages: Representations
) -> tuple[Tensor, Tensor, Tensor]:
    """What this rank's queries see outside their own groups, over all ranks' passages.

    Args:
        walk: tiles of `queries` and `passages`, without graph.
        counts: queries of each rank.
        distill: walk a second time for the means.
        queries: all ranks', gathered with their graph.
        passages: this rank's.

    Returns:
        lse [scores, Q], mean [distilled heads, Q] (no rows without `distill`), and the highest logit [scores, Q], which has no gradient.
    """
    return _OutsideGroup.apply(walk, counts, distill, *queries.floats(), *passages.floats())
