"""The unified loss (arXiv 2402.03216, section 3.3): InfoNCE per head and for their sum, self-distillation,
teachers.

`retrieval_loss` is what an objective calls: it scores this rank's queries against the passages they see and
adds up the losses of rows.py, over whole score matrices where they fit, in tiles where they would not.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from megam3.batch import Representations
from megam3.loss.distillation import TeacherGroups, find_margin_rule, teacher_rows
from megam3.loss.limits import loss_needs_tiles
from megam3.loss.negatives import Negatives
from megam3.loss.positives import Positives, highest_of, hit_rows, infonce_rows
from megam3.loss.rows import LossTerms, add_up, collect_rows
from megam3.loss.settings import LossSettings
from megam3.loss.tiled import tiled_unified_loss
from megam3.scoring.combine import RankCounts, score_global, score_heads


def retrieval_loss(
    queries: Representations,
    passages: Representations,
    *,
    negatives: Negatives,
    settings: LossSettings,
    counts: RankCounts,
    distill: bool,
    teacher: TeacherGroups | None = None,
    tiles: Literal["auto", "always", "never"] = "auto",
) -> LossTerms:
    """The loss of this rank's queries; every rank calls it.

    Args:
        queries, passages: of this rank; a query's group is contiguous, groups in the order of queries.
        negatives: of this rank's queries, on the device of the representations; columns are all ranks'
            passages, or this rank's alone when in-batch negatives are off.
        counts: `count_over_ranks(queries, passages)`.
        distill: self-distillation on (`settings.distills(step)`).
        teacher: needed when `settings.teacher` is set and the batch carries scores; without it the plain loss
            is used.
        tiles: whether to work in tiles; auto: when whole matrices would be too large.
    """
    if tiles == "always" or (tiles == "auto" and _needs_tiles(counts, settings)):
        return tiled_unified_loss(queries, passages, negatives, settings, counts, distill, teacher=teacher)
    if negatives.in_batch_negatives:
        scores = score_global(
            queries, passages, settings.sum_weights, settings.maxsim, settings.heads, counts
        )
    else:
        # a query meets its own group alone: other ranks' passages would be scored only to be masked
        scores = score_heads(queries, passages, settings.sum_weights, settings.maxsim, settings.heads)
    return unified_loss(
        scores.by_name(),
        negatives.positive_column_Q,
        negatives.visible(),
        settings,
        counts.row_scale,
        distill,
        teacher,
        negatives.positive_counts,
    )


def _needs_tiles(counts: RankCounts, settings: LossSettings) -> bool:
    """Every rank decides by the same numbers, because the two losses talk differently."""
    query_rows = sum(counts.rows_by_query) if "multi_vector" in settings.heads else 0
    return loss_needs_tiles(max(counts.queries), sum(counts.passages), query_rows, max(counts.passages))


def unified_loss(
    scores: Mapping[str, Tensor],
    positive_column_Q: Tensor,
    visible_QP: Tensor,
    settings: LossSettings,
    row_scale: float,
    distill: bool,
    teacher: TeacherGroups | None = None,
    positive_counts: tuple[int, ...] = (),
) -> LossTerms:
    """The loss of one rank's queries over whole score matrices. Pure.

    Args:
        scores: dense, lexical, multi_vector, sum (those the settings need) as scores_QP, before the
            temperature.
        positive_column_Q: int64, the (first) drawn positive; visible there.
        visible_QP: bool, which columns each softmax sees.
        row_scale: W / number of queries over all ranks.
        distill, teacher: as in `retrieval_loss`.
        positive_counts: drawn positives of each query, side by side and visible; () where each has one.
    """
    positives = Positives(positive_column_Q, positive_counts)
    positive_QD, exists_QD = positives.columns()
    positive_sum_Q = None
    if "sum" in scores:
        positive_sum_Q = highest_of(scores["sum"].gather(1, positive_QD), exists_QD).squeeze(1)
    rule = find_margin_rule(settings, positive_sum_Q, teacher, positives)
    columns_QG = positive_QD if teacher is None else teacher.columns_QG
    visible_QP = rule.exclude(columns_QG, scores.get("sum"), visible_QP)
    # the lowest finite number, not −inf: 0 · −inf in the distillation would be NaN
    logits = {
        name: (x / settings.temperatures[name]).masked_fill(~visible_QP, torch.finfo(x.dtype).min)
        for name, x in scores.items()
    }
    distill = distill and bool(settings.distilled)
    has_several = positives.most > 1
    # with several positives InfoNCE is no log-probability of one softmax over everything
    trained = () if has_several else settings.trained
    needed = {*trained, *((*settings.distilled, "sum") if distill else ())}
    log_probs = {name: torch.log_softmax(logits[name], dim=1) for name in settings.scores if name in needed}
    target_QP = log_probs["sum"].detach().exp() if distill else None

    def taught(name: str) -> Tensor:
        assert teacher is not None
        own_QG = logits[name].gather(1, teacher.columns_QG)
        seen_QG = teacher.exists_QG & visible_QP.gather(1, teacher.columns_QG)
        lowest = torch.finfo(own_QG.dtype).min

        def others_Q() -> Tensor:
            return logits[name].scatter(1, teacher.columns_QG, lowest).logsumexp(1)

        return teacher_rows(settings, name, own_QG, others_Q, teacher, seen_QG, positives)

    def distilled(name: str) -> Tensor:
        assert target_QP is not None
        return -(target_QP * log_probs[name]).sum(1)

    def infonce(name: str) -> Tensor:
        if not has_several:
            return -log_probs[name].gather(1, positive_QD).squeeze(1)
        negatives_Q = _without(logits[name], positive_QD).logsumexp(1)
        return infonce_rows(logits[name].gather(1, positive_QD), exists_QD, negatives_Q)

    rows = collect_rows(
        settings,
        has_teacher=teacher is not None,
        distill=distill,
        infonce=infonce,
        taught=taught,
        distilled=distilled,
    )
    hits = {name: _hits(x.detach(), positive_QD, exists_QD) for name, x in logits.items()}
    return add_up(rows, hits, settings, row_scale)


def _hits(logits_QP: Tensor, positive_QD: Tensor, exists_QD: Tensor) -> Tensor:
    """[Q]: whether the drawn positive is above everything else, or the share of several that are above all
    negatives. A tie is no hit: a dead head, which scores everything alike, must not look accurate."""
    own_QD = logits_QP.gather(1, positive_QD)
    if positive_QD.shape[1] > 1:
        return hit_rows(own_QD, exists_QD, _without(logits_QP, positive_QD).amax(1))
    level_QP = logits_QP >= own_QD
    return level_QP.sum(1) == 1


def _without(logits_QP: Tensor, positive_QD: Tensor) -> Tensor:
    """Logits with the drawn positives hidden."""
    return logits_QP.scatter(1, positive_QD, torch.finfo(logits_QP.dtype).min)
