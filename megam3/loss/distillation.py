"""What a teacher's scores of a query's own group do, and the margin rule that takes likely positives out.
Pure.

A group's logits come side by side, own_QG, drawn positives first; `seen_QG` says which places hold a passage
that the query may see. With y the softmax over what is seen of the teacher's scores / teacher_temperature:

    kl_div       −Σ y_i · log softmax(own)_i over the own group
    m3_kd_loss   Σ_i y_i · (log Σ exp over the group from its i-th passage on and all other columns, − own_i)
                 with the drawn positives first, then negatives, either by falling teacher score: each is
                     learned against what should rank below it
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megam3.loss.positives import Positives, highest_of
from megam3.loss.settings import LossSettings


@dataclass(frozen=True)
class TeacherGroups:
    """Teacher scores of each query's own group, drawn positives first."""

    scores_QG: Tensor
    """float; anything where a shorter group has no passage."""
    columns_QG: Tensor
    """int64 column of each."""
    exists_QG: Tensor
    """bool."""


@dataclass(frozen=True)
class MarginRule:
    """Columns that score above the query's positive by more than a margin are likely unlabelled positives:
    left out."""

    limit_Q: Tensor | None
    """Highest combined score a column may have; None: the rule does not look at it."""
    above_QG: Tensor | None
    """bool: places of the own group that the teacher scores too high; None: the rule does not ask it."""

    def exclude(self, columns_QG: Tensor, sum_QP: Tensor | None, visible_QP: Tensor) -> Tensor:
        """`visible_QP` without the columns that the rule leaves out, over whole matrices."""
        if self.limit_Q is not None and sum_QP is not None:
            return visible_QP & ~(sum_QP.detach() > self.limit_Q[:, None])
        if self.above_QG is not None:
            # places a group does not have repeat its last column: add, do not assign
            above_QP = torch.zeros_like(visible_QP, dtype=torch.int32)
            above_QP = above_QP.scatter_add_(1, columns_QG, self.above_QG.to(torch.int32))
            return visible_QP & ~above_QP.bool()
        return visible_QP

    def exclude_in_group(self, sum_QG: Tensor | None, visible_QG: Tensor, positives: Positives) -> Tensor:
        """The same over the own groups side by side; the drawn positives, which come first, always stay."""
        if self.limit_Q is not None and sum_QG is not None:
            visible_QG = visible_QG & ~(sum_QG.detach() > self.limit_Q[:, None])
        elif self.above_QG is not None:
            visible_QG = visible_QG & ~self.above_QG
        return visible_QG | positives.is_positive(visible_QG.shape[1])


def find_margin_rule(
    settings: LossSettings,
    positive_sum_Q: Tensor | None,
    teacher: TeacherGroups | None,
    positives: Positives,
) -> MarginRule:
    """The rule these settings ask for.

    Args:
        positive_sum_Q: combined score of each query's positive, of several the highest; None where no
            combined score is formed.
        teacher: None when the batch carries no teacher scores, of which the rule then knows nothing.
    """
    margin = settings.false_negative_margin
    if margin is None:
        return MarginRule(None, None)
    if settings.margin_source == "sum":
        assert positive_sum_Q is not None, "the margin on the sum needs the combined score"
        return MarginRule(positive_sum_Q.detach() + margin, None)
    if teacher is None:
        return MarginRule(None, None)
    if teacher.scores_QG.shape[1] == 0:
        return MarginRule(None, teacher.exists_QG)
    is_positive_QG = positives.is_positive(teacher.scores_QG.shape[1])
    limit_Q1 = highest_of(teacher.scores_QG, is_positive_QG) + margin
    return MarginRule(None, (teacher.scores_QG > limit_Q1) & teacher.exists_QG)


def teacher_rows(
    settings: LossSettings,
    name: str,
    own_QG: Tensor,
    others_Q: Callable[[], Tensor],
    teacher: TeacherGroups,
    seen_QG: Tensor,
    positives: Positives,
) -> Tensor:
    """Teacher distillation of the score `name`, per query.

    Args:
        own_QG: logits of the own group, drawn positives first, at the score's own temperature.
        others_Q: gives log Σ exp over every column the query sees outside its own group; asked by
            `m3_kd_loss` alone.
        seen_QG: places that hold a passage the query may see.
    """
    scores_QG = teacher.scores_QG / settings.teacher_temperature
    if settings.teacher == "m3_kd_loss":
        is_positive_QG = positives.is_positive(own_QG.shape[1])
        return m3_kd_rows(own_QG, others_Q(), scores_QG, seen_QG, is_positive_QG)
    if settings.student_temperature is not None:
        # from s/τ to s/τ_student; what is not seen holds the lowest number, which must not overflow
        rescale = settings.temperatures[name] / settings.student_temperature
        own_QG = own_QG.masked_fill(~seen_QG, 0.0) * rescale
    return kl_div_rows(own_QG, scores_QG, seen_QG)


def _target(scores_QG: Tensor, seen_QG: Tensor) -> Tensor:
    return torch.softmax(scores_QG.masked_fill(~seen_QG, float("-inf")), dim=1)


def kl_div_rows(own_QG: Tensor, scores_QG: Tensor, seen_QG: Tensor) -> Tensor:
    """−Σ y · log softmax over the own group, per query (KL up to the teacher's entropy, which is
    constant)."""
    own_QG = own_QG.masked_fill(~seen_QG, torch.finfo(own_QG.dtype).min)
    return -(_target(scores_QG, seen_QG) * torch.log_softmax(own_QG, dim=1)).sum(1)


def m3_kd_rows(
    own_QG: Tensor, others_Q: Tensor, scores_QG: Tensor, seen_QG: Tensor, is_positive_QG: Tensor
) -> Tensor:
    """The masked sequence, per query (FlagEmbedding's `m3_kd_loss`; its order of negatives is made here,
    whatever the record's).

    Args:
        others_Q: log Σ exp over every column the query sees outside its own group.
    """
    if own_QG.shape[1] == 0:
        # no queries: still a function of both, or the backward pass of an exchange behind them would be left
        # out on this rank
        return own_QG.sum(1) + others_Q
    lowest = torch.finfo(own_QG.dtype).min
    rank_QG = scores_QG.masked_fill(~seen_QG, float("-inf"))
    order_QG = rank_QG.argsort(dim=1, descending=True, stable=True)
    # two stable sorts: positives before negatives, and either by falling score
    later_QG = (~is_positive_QG).gather(1, order_QG).to(torch.int8)
    order_QG = order_QG.gather(1, later_QG.argsort(dim=1, stable=True))
    target_QG, seen_QG, own_QG = (
        x.gather(1, order_QG) for x in (_target(scores_QG, seen_QG), seen_QG, own_QG)
    )
    own_QG = own_QG.masked_fill(~seen_QG, lowest)
    # row i of the triangle: the own group from its i-th passage on
    later_GG = torch.ones(own_QG.shape[1], own_QG.shape[1], dtype=torch.bool, device=own_QG.device).triu()
    own_from_QG = own_QG[:, None, :].masked_fill(~later_GG, lowest).logsumexp(2)
    rows_QG = torch.logaddexp(own_from_QG, others_Q[:, None]) - own_QG
    return (target_QG * rows_QG.masked_fill(~seen_QG, 0.0)).sum(1)
