"""The unified loss for batches whose score matrices would not fit: equal to `unified_loss`, in the memory of one tile.

The own group of each query, a handful of columns, is scored with an ordinary graph; all other columns enter through the few numbers per
query that `megam3.tiled.walk` sums up. Log-sum-exps of the two parts add up. Worked example: logits of one query are [2., 1.] in its group
and [0., 0.] outside; lse outside is log 2, InfoNCE = log(e² + e¹ + e^(log 2)) − 2.

Queries travel to every rank for every head here, passages to none. Time: one forward product more than the plain loss, or two, distilling.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megam3.batch import Representations
from megam3.candidates import Candidates
from megam3.dist import comm
from megam3.dist.gather import gather_rows
from megam3.losses import LossSettings, LossTerms, assemble
from megam3.memory import GROUP_TILE_TEXTS, texts_per_tile
from megam3.scoring.combine import RankCounts, gather_queries
from megam3.scoring.split import keep_heads, split_texts
from megam3.teacher import TeacherGroups, kl_div_rows, m3_kd_rows, margin_mask
from megam3.tiled.walk import Walk, outside_group


def _tile_sizes(num_texts: int, size: int) -> list[int]:
    """Even a rank without texts has one tile, of none: its shapes are needed."""
    return [min(size, num_texts - start) for start in range(0, num_texts, size)] or [0]


def _tile_texts(counts: RankCounts, settings: LossSettings) -> int:
    """Texts per side of a tile; the same on every rank."""
    return texts_per_tile(
        sum(counts.query_rows) / max(1, sum(counts.queries)) if "multi_vector" in settings.heads else 0
    )


def _own_groups(walk: Walk, queries: Representations, passages: Representations) -> dict[str, Tensor]:
    """Scores of each query with its own group side by side, positive first, with an ordinary graph; each [Q, G]."""
    columns_QG, _ = walk.candidates.group_columns()
    sizes = _tile_sizes(queries.num_texts, GROUP_TILE_TEXTS)
    starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    stops_Q = (walk.candidates.group_stop_Q - walk.first_column).tolist()
    edges = [0, *(stops_Q[stop - 1] if stop else 0 for stop in starts[1:])]
    parts: dict[str, list[Tensor]] = {name: [] for name in walk.names}
    blocks = split_texts(passages, [stop - start for start, stop in zip(edges, edges[1:])])
    for index, (query_block, passage_block) in enumerate(zip(split_texts(queries, sizes), blocks)):
        local_QG = columns_QG[starts[index] : starts[index + 1]] - walk.first_column - edges[index]
        for name, scores in walk.score(query_block, passage_block).by_name().items():
            # without passages there is nothing to gather from, and no row to gather
            parts[name].append(
                scores.gather(1, local_QG)
                if scores.numel()
                else scores.sum() + scores.new_zeros(local_QG.shape)
            )
    return {name: torch.cat(each) for name, each in parts.items()}


def _seen(
    candidates: Candidates, own: dict[str, Tensor], settings: LossSettings, teacher: TeacherGroups | None
) -> Tensor:
    """Which places of each query's group its softmax sees; the positive's always."""
    columns_QG, exists_QG = candidates.group_columns()
    seen_QG = exists_QG.clone()
    if candidates.mask_false_negatives:
        seen_QG &= candidates.passage_hash_P[columns_QG] != candidates.positive_hash_Q[:, None]
    if settings.false_negative_margin is not None and settings.margin_source == "sum":
        seen_QG &= ~margin_mask(
            own["sum"].detach(), own["sum"].detach()[:, :1].sum(1), settings.false_negative_margin
        )
    elif settings.false_negative_margin is not None and teacher is not None:
        seen_QG &= ~margin_mask(
            teacher.scores_QG, teacher.scores_QG[:, :1].sum(1), settings.false_negative_margin
        )
    seen_QG[:, :1] = True
    return seen_QG


@dataclass(frozen=True)
class _Sight:
    """Logits of one score: the own group's, and the summary of all other columns."""

    own_QG: Tensor
    others_Q: Tensor
    highest_Q: Tensor

    @property
    def positive_Q(self) -> Tensor:
        """Logit of the positive."""
        return self.own_QG[:, :1].sum(1)

    @property
    def lse_Q(self) -> Tensor:
        """log Σ exp over everything the query sees."""
        return torch.logaddexp(self.own_QG.logsumexp(1), self.others_Q)

    @property
    def hit_Q(self) -> Tensor:
        """Whether the positive is above everything else."""
        rivals = torch.cat([self.own_QG[:, 1:], self.highest_Q[:, None]], dim=1).detach()
        return self.positive_Q.detach() > rivals.amax(1)


def _rows(
    sights: dict[str, _Sight],
    means: dict[str, Tensor],
    seen_QG: Tensor,
    settings: LossSettings,
    teacher: TeacherGroups | None,
) -> dict[str, Tensor]:
    """Per-query losses, named as in `LossTerms.terms`; `means` of the heads being distilled."""
    rows: dict[str, Tensor] = {}
    for name in settings.trained:
        sight = sights[name]
        if teacher is None or settings.teacher != "m3_kd_loss":
            rows[name] = sight.lse_Q - sight.positive_Q
        if teacher is not None and settings.teacher == "kl_div":
            rows[f"teacher_{name}"] = kl_div_rows(sight.own_QG, teacher.scores_QG, seen_QG)
        elif teacher is not None and settings.teacher is not None:
            rows[f"teacher_{name}"] = m3_kd_rows(sight.own_QG, sight.others_Q, teacher.scores_QG, seen_QG)
    if means:
        of_sum = sights["sum"].lse_Q.detach()
        target_QG = (sights["sum"].own_QG.detach() - of_sum[:, None]).exp()
        share_Q = (sights["sum"].others_Q.detach() - of_sum).exp()
        for name, mean_Q in means.items():
            rows[f"distill_{name}"] = (
                sights[name].lse_Q - (target_QG * sights[name].own_QG).sum(1) - share_Q * mean_Q
            )
    return rows


def _everyones(candidates: Candidates, counts: RankCounts) -> Candidates:
    """Rows of all ranks; columns are all ranks' already."""
    return Candidates(
        gather_rows(candidates.positive_column_Q, counts.queries),
        gather_rows(candidates.group_stop_Q, counts.queries),
        candidates.passage_hash_P,
        gather_rows(candidates.positive_hash_Q, counts.queries),
        candidates.in_batch_negatives,
        candidates.mask_false_negatives,
    )


def _outside(
    walk: Walk,
    queries: Representations,
    passages: Representations,
    counts: RankCounts,
    distill: bool,
    tile_texts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """lse, mean and highest logit outside the own group, of this rank's queries; `walk` is that of this rank's queries still."""
    if not walk.candidates.in_batch_negatives:
        dtype = torch.promote_types(queries.dense_ND.dtype, torch.float32)
        lowest = torch.full(
            (len(walk.names), queries.num_texts),
            torch.finfo(dtype).min,
            dtype=dtype,
            device=queries.dense_ND.device,
        )
        return lowest, torch.zeros_like(lowest)[: len(walk.settings.distilled)], lowest
    everyones = keep_heads(
        gather_queries(queries, counts, {"dense", *walk.settings.heads}), walk.settings.heads
    )
    sides = []
    for texts in (everyones, passages):
        without_graph = texts.with_floats(*(x.detach() for x in texts.floats()))
        sides.append(split_texts(without_graph, _tile_sizes(texts.num_texts, tile_texts)))
    walk = replace(
        walk,
        query_tiles=sides[0],
        passage_tiles=sides[1],
        candidates=_everyones(walk.candidates, counts),
        limit_Q=None if walk.limit_Q is None else gather_rows(walk.limit_Q, counts.queries).detach(),
    )
    return outside_group(walk, counts.queries, distill, everyones, passages)


def tiled_unified_loss(
    queries: Representations,
    passages: Representations,
    candidates: Candidates,
    settings: LossSettings,
    counts: RankCounts,
    distill: bool,
    maxsim: Literal["mean", "sum"] = "mean",
    teacher: TeacherGroups | None = None,
    tile_texts: int | None = None,
) -> LossTerms:
    """`unified_loss` of this rank's queries over all ranks' passages, without a score matrix.

    Args:
        queries, passages: of this rank; a query's group is contiguous, groups in the order of queries.
        candidates: of this rank's queries, on the device of the representations; columns are all ranks' passages, or this rank's alone when
            in-batch negatives are off.
        counts: `count_over_ranks(queries, passages)`.
        distill: self-distillation on.
        teacher: as in `unified_loss`.
        tile_texts: queries and passages of a tile; None: `megam3.memory.texts_per_tile`.
    """
    tile_texts = tile_texts or _tile_texts(counts, settings)
    distill = distill and bool(settings.distilled)
    queries, passages = keep_heads(queries, settings.heads), keep_heads(passages, settings.heads)
    first_column = counts.first_passage if candidates.in_batch_negatives else 0
    walk = Walk([], [], candidates, first_column, None, settings, maxsim)
    own = _own_groups(walk, queries, passages)
    seen_QG = _seen(candidates, own, settings, teacher)
    if settings.false_negative_margin is not None and settings.margin_source == "sum":
        walk = replace(walk, limit_Q=own["sum"].detach()[:, :1].sum(1) + settings.false_negative_margin)
    outside = _outside(walk, queries, passages, counts, distill, tile_texts)
    sights = {}
    for index, name in enumerate(walk.names):
        logits = (own[name] / settings.temperature).masked_fill(~seen_QG, torch.finfo(own[name].dtype).min)
        sights[name] = _Sight(logits, outside[0][index], outside[2][index])
    means = dict(zip(settings.distilled, outside[1])) if distill else {}
    rows = _rows(sights, means, seen_QG, settings, teacher)
    return assemble(
        rows,
        {name: sight.hit_Q for name, sight in sights.items()},
        settings,
        comm.world_size() / sum(counts.queries),
    )
