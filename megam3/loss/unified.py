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
    )


def _needs_tiles(counts: RankCounts, settings: LossSettings) -> bool:
    """Every rank decides by the same numbers, because the two losses talk differently."""
    query_rows = sum(counts.query_rows) if "multi_vector" in settings.heads else 0
    return loss_needs_tiles(max(counts.queries), sum(counts.passages), query_rows, max(counts.passages))


def unified_loss(
    scores: Mapping[str, Tensor],
    positive_column_Q: Tensor,
    visible_QP: Tensor,
    settings: LossSettings,
    row_scale: float,
    distill: bool,
    teacher: TeacherGroups | None = None,
) -> LossTerms:
    """The loss of one rank's queries over whole score matrices. Pure.

    Args:
        scores: dense, lexical, multi_vector, sum (those the settings need) as scores_QP, before the
            temperature.
        positive_column_Q: int64; visible there.
        visible_QP: bool, which columns each softmax sees.
        row_scale: W / number of queries over all ranks.
        distill, teacher: as in `retrieval_loss`.
    """
    positive_Q1 = positive_column_Q[:, None]
    positive_sum_Q = scores["sum"].gather(1, positive_Q1).squeeze(1) if "sum" in scores else None
    rule = find_margin_rule(settings, positive_sum_Q, teacher)
    columns_QG = positive_Q1 if teacher is None else teacher.columns_QG
    visible_QP = rule.exclude(columns_QG, scores.get("sum"), visible_QP)
    # the lowest finite number, not −inf: 0 · −inf in the distillation would be NaN
    logits = {
        name: (x / settings.temperature).masked_fill(~visible_QP, torch.finfo(x.dtype).min)
        for name, x in scores.items()
    }
    distill = distill and bool(settings.distilled)
    needed = {*settings.trained, *((*settings.distilled, "sum") if distill else ())}
    log_probs = {name: torch.log_softmax(logits[name], dim=1) for name in settings.scores if name in needed}
    target_QP = log_probs["sum"].detach().exp() if distill else None

    def taught(name: str) -> Tensor:
        assert teacher is not None
        assert settings.teacher is not None
        own_QG = logits[name].gather(1, teacher.columns_QG)
        seen_QG = teacher.exists_QG & visible_QP.gather(1, teacher.columns_QG)
        lowest = torch.finfo(own_QG.dtype).min

        def others_Q() -> Tensor:
            return logits[name].scatter(1, teacher.columns_QG, lowest).logsumexp(1)

        return teacher_rows(settings.teacher, own_QG, others_Q, teacher, seen_QG)

    def distilled(name: str) -> Tensor:
        assert target_QP is not None
        return -(target_QP * log_probs[name]).sum(1)

    rows = collect_rows(
        settings,
        has_teacher=teacher is not None,
        distill=distill,
        infonce=lambda name: -log_probs[name].gather(1, positive_Q1).squeeze(1),
        taught=taught,
        distilled=distilled,
    )
    # a tie is no hit: a dead head, which scores everything alike, must not look accurate
    level = {name: x.detach() >= x.detach().gather(1, positive_Q1) for name, x in logits.items()}
    return add_up(rows, {name: x.sum(1) == 1 for name, x in level.items()}, settings, row_scale)
