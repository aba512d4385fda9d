"""The unified loss for batches whose score matrices would not fit: equal to `unified_loss`, in the memory of
one tile.

The own group of each query, a handful of columns, is scored with an ordinary graph; all other columns enter
through the few numbers per query that `megam3.loss.tiles` sums up. Log-sum-exps of the two parts add up.
Worked example: logits of one query are [2., 1.] in its group and [0., 0.] outside; lse outside is log 2,
InfoNCE = log(e² + e¹ + e^(log 2)) − 2.

Queries travel to every rank for every head here, passages to none. Time: one forward product more than the
plain loss, or two while distilling.
"""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megam3.batch import Representations
from megam3.dist.gather import gather_rows
from megam3.loss.distillation import MarginRule, TeacherGroups, find_margin_rule, teacher_rows
from megam3.loss.limits import GROUP_TILE_TEXTS, texts_per_tile
from megam3.loss.negatives import Negatives
from megam3.loss.positives import Positives, highest_of, hit_rows, infonce_rows
from megam3.loss.rows import LossTerms, add_up, collect_rows
from megam3.loss.settings import LossSettings
from megam3.loss.tiles import OutsideGroup, TileGrid, score_settings_heads, sum_outside_group
from megam3.scoring.combine import RankCounts, gather_queries


def _tile_sizes(num_texts: int, size: int) -> list[int]:
    """Even a rank without texts has one tile, of none: its shapes are needed."""
    return [min(size, num_texts - start) for start in range(0, num_texts, size)] or [0]


def _default_tile_texts(counts: RankCounts, settings: LossSettings) -> int:
    """Texts per side of a tile; the same on every rank, because it is a function of all ranks' counts."""
    if "multi_vector" not in settings.heads:
        return texts_per_tile(0)
    return texts_per_tile(sum(counts.rows_by_query) / max(1, sum(counts.queries)))


def _own_groups(
    queries: Representations,
    passages: Representations,
    negatives: Negatives,
    first_column: int,
    settings: LossSettings,
) -> dict[str, Tensor]:
    """Scores of each query with its own group side by side, positive first, with an ordinary graph; each [Q,
    G].

    GROUP_TILE_TEXTS queries at a time meet the passages of those queries, of which each keeps its own few.
    """
    # groups are contiguous: a block of queries meets one contiguous run of passages
    columns_QG, _ = negatives.group_columns()
    sizes = _tile_sizes(queries.num_texts, GROUP_TILE_TEXTS)
    starts = [0, *accumulate(sizes)]
    edges = [sum(negatives.group_sizes[:stop]) for stop in starts]
    parts: dict[str, list[Tensor]] = {name: [] for name in settings.scores}
    blocks = passages.split([stop - start for start, stop in zip(edges, edges[1:])])
    for index, (query_block, passage_block) in enumerate(zip(queries.split(sizes), blocks)):
        local_QG = columns_QG[starts[index] : starts[index + 1]] - first_column - edges[index]
        for name, scores in score_settings_heads(query_block, passage_block, settings).by_name().items():
            # without passages there is nothing to gather from, and no row to gather
            none = scores.sum() + scores.new_zeros(local_QG.shape)
            parts[name].append(scores.gather(1, local_QG) if scores.numel() else none)
    return {name: torch.cat(each) for name, each in parts.items()}


@dataclass(frozen=True, kw_only=True)
class _QueryLogits:
    """Logits of one score as each query sees them: its own group's, and a summary of all other columns."""

    own_QG: Tensor
    others_Q: Tensor
    """log Σ exp over the other columns."""
    highest_Q: Tensor
    """The highest of them."""
    positives: Positives

    @property
    def lse_Q(self) -> Tensor:
        """log Σ exp over everything the query sees."""
        return torch.logaddexp(self.own_QG.logsumexp(1), self.others_Q)

    @property
    def infonce_Q(self) -> Tensor:
        """InfoNCE of the drawn positives."""
        if self.positives.most == 1:
            # without queries a group has no columns either: a sum is a function of them all the same
            return self.lse_Q - self.own_QG[:, :1].sum(1)
        most = self.positives.most
        positive_QD, exists_QD = self.own_QG[:, :most], self.positives.is_positive(most)
        negatives_Q = torch.logaddexp(self._rivals_QG().logsumexp(1), self.others_Q)
        return infonce_rows(positive_QD, exists_QD, negatives_Q)

    @property
    def hit_Q(self) -> Tensor:
        """Share of the drawn positives that are above everything else."""
        most = self.positives.most
        rivals_QG = torch.cat([self._rivals_QG(), self.highest_Q[:, None]], dim=1)
        exists_QD = self.positives.is_positive(most)
        if self.own_QG.shape[1] == 0:
            return self.highest_Q
        return hit_rows(self.own_QG[:, :most], exists_QD, rivals_QG.amax(1))

    def _rivals_QG(self) -> Tensor:
        """The own group, its drawn positives hidden."""
        is_positive_QG = self.positives.is_positive(self.own_QG.shape[1])
        return self.own_QG.masked_fill(is_positive_QG, torch.finfo(self.own_QG.dtype).min)


def _best_positive(sum_QG: Tensor, positives: Positives) -> Tensor:
    """Combined score of each query's positive, of several the highest; detached."""
    most = positives.most
    if sum_QG.shape[1] == 0:
        return sum_QG.detach().sum(1)
    return highest_of(sum_QG[:, :most], positives.is_positive(most)).squeeze(1)


def _rows(
    logits: dict[str, _QueryLogits],
    mean_of: dict[str, Tensor],
    seen_QG: Tensor,
    positives: Positives,
    settings: LossSettings,
    teacher: TeacherGroups | None,
) -> dict[str, Tensor]:
    """Per-query losses; `mean_of` the heads being distilled."""

    def taught(name: str) -> Tensor:
        assert teacher is not None
        part = logits[name]
        return teacher_rows(settings, name, part.own_QG, lambda: part.others_Q, teacher, seen_QG, positives)

    def distilled(name: str) -> Tensor:
        # Σ t·s over everything = Σ over the own group + (share of the others) · (their mean)
        lse_of_sum_Q = logits["sum"].lse_Q.detach()
        target_QG = (logits["sum"].own_QG.detach() - lse_of_sum_Q[:, None]).exp()
        share_Q = (logits["sum"].others_Q.detach() - lse_of_sum_Q).exp()
        own_Q = (target_QG * logits[name].own_QG).sum(1)
        return logits[name].lse_Q - own_Q - share_Q * mean_of[name]

    return collect_rows(
        settings,
        has_teacher=teacher is not None,
        distill=bool(mean_of),
        infonce=lambda name: logits[name].infonce_Q,
        taught=taught,
        distilled=distilled,
    )


def _outside(
    queries: Representations,
    passages: Representations,
    negatives: Negatives,
    rule: MarginRule,
    settings: LossSettings,
    counts: RankCounts,
    distill: bool,
    tile_texts: int,
) -> OutsideGroup:
    """Sums over the columns outside the own group, of this rank's queries; collective."""
    if not negatives.in_batch_negatives:
        # there are none: the lowest number is the log-sum-exp of nothing
        dtype = torch.promote_types(queries.dense_ND.dtype, torch.float32)
        shape = (len(settings.scores), queries.num_texts)
        lowest_HQ = torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=queries.dense_ND.device)
        return OutsideGroup(lowest_HQ, torch.zeros_like(lowest_HQ)[: len(settings.distilled)], lowest_HQ)
    # queries are few and short, passages many and long: only queries travel
    of_all = gather_queries(queries, counts, {"dense", *settings.heads}).keep_heads(settings.heads)
    tiles = [
        texts.with_floats(*(x.detach() for x in texts.floats())).split(
            _tile_sizes(texts.num_texts, tile_texts)
        )
        for texts in (of_all, passages)
    ]
    grid = TileGrid(
        query_tiles=tiles[0],
        passage_tiles=tiles[1],
        negatives=negatives.of_all_ranks(counts.queries),
        first_column=counts.first_passage,
        limit_Q=None if rule.limit_Q is None else gather_rows(rule.limit_Q, counts.queries).detach(),
        settings=settings,
    )
    return sum_outside_group(grid, counts.queries, distill, of_all, passages)


def tiled_unified_loss(
    queries: Representations,
    passages: Representations,
    negatives: Negatives,
    settings: LossSettings,
    counts: RankCounts,
    distill: bool,
    *,
    teacher: TeacherGroups | None = None,
    tile_texts: int | None = None,
) -> LossTerms:
    """`unified_loss` of this rank's queries over all ranks' passages, without a score matrix.

    Args: as `megam3.loss.unified.retrieval_loss`; `tile_texts` is queries and passages of a tile, None: by
    the limits.
    """
    tile_texts = tile_texts or _default_tile_texts(counts, settings)
    distill = distill and bool(settings.distilled)
    queries, passages = queries.keep_heads(settings.heads), passages.keep_heads(settings.heads)
    first_column = counts.first_passage if negatives.in_batch_negatives else 0
    own = _own_groups(queries, passages, negatives, first_column, settings)
    positives = negatives.positives()
    positive_sum_Q = _best_positive(own["sum"], positives) if "sum" in own else None
    rule = find_margin_rule(settings, positive_sum_Q, teacher, positives)
    # the rule's limit is the positive's own score, which is known only after the groups are scored
    seen_QG = rule.exclude_in_group(own.get("sum"), negatives.visible_in_group(), positives)
    outside = _outside(queries, passages, negatives, rule, settings, counts, distill, tile_texts)
    logits = {}
    for index, name in enumerate(settings.scores):
        lowest = torch.finfo(own[name].dtype).min
        own_QG = (own[name] / settings.temperatures[name]).masked_fill(~seen_QG, lowest)
        logits[name] = _QueryLogits(
            own_QG=own_QG,
            others_Q=outside.lse_HQ[index],
            highest_Q=outside.highest_HQ[index],
            positives=positives,
        )
    mean_of = dict(zip(settings.distilled, outside.mean_DQ)) if distill else {}
    rows = _rows(logits, mean_of, seen_QG, positives, settings, teacher)
    hits = {name: part.hit_Q for name, part in logits.items()}
    return add_up(rows, hits, settings, counts.row_scale)
