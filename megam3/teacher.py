"""What a teacher's scores of a query's own group do: two distillation losses, and the margin rules that take likely positives out. Pure.

A group's logits come side by side, own_QG, positive first; `seen_QG` says which places hold a passage that the query may see. With y the
softmax of the teacher's scores over what is seen:

    kl_div       −Σ y_i · log softmax(own)_i over the own group
    m3_kd_loss   Σ_i y_i · (log Σ over the group from its i-th passage on, and over all other columns, of exp − own_i)
                 with the positive first, then negatives by falling teacher score: each is learned against what should rank below it
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TeacherGroups:
    """Teacher scores of each query's own group, positive first."""

    scores_QG: Tensor
    """float; anything where a shorter group has no passage."""
    columns_QG: Tensor
    """int64 column of each."""
    exists_QG: Tensor
    """bool."""


def margin_mask(scores_QP: Tensor, positive_score_Q: Tensor, margin: float) -> Tensor:
    """True where a column scores above the query's positive by more than `margin`: likely an unlabelled positive."""
    return scores_QP > positive_score_Q[:, None] + margin


def teacher_margin_mask(teacher: TeacherGroups, num_columns: int, margin: float) -> Tensor:
    """The same by teacher scores, spread over all columns; they know the own group only."""
    above_QG = margin_mask(teacher.scores_QG, teacher.scores_QG[:, :1].sum(1), margin) & teacher.exists_QG
    mask_QP = torch.zeros(above_QG.shape[0], num_columns, dtype=torch.int32, device=above_QG.device)
    # places a group does not have repeat its last column: add, do not assign
    return mask_QP.scatter_add_(1, teacher.columns_QG, above_QG.to(torch.int32)).bool()


def _target(scores_QG: Tensor, seen_QG: Tensor) -> Tensor:
    return torch.softmax(scores_QG.masked_fill(~seen_QG, float("-inf")), dim=1)


def kl_div_rows(own_QG: Tensor, scores_QG: Tensor, seen_QG: Tensor) -> Tensor:
    """−Σ y · log softmax over the own group, per query (KL up to the teacher's entropy, which is constant)."""
    own_QG = own_QG.masked_fill(~seen_QG, torch.finfo(own_QG.dtype).min)
    return -(_target(scores_QG, seen_QG) * torch.log_softmax(own_QG, dim=1)).sum(1)


def m3_kd_rows(own_QG: Tensor, others_Q: Tensor, scores_QG: Tensor, seen_QG: Tensor) -> Tensor:
    """The masked sequence, per query (FlagEmbedding's `m3_kd_loss`; its order of negatives is made here, whatever the record's).

    Args:
        others_Q: log Σ exp over every column the query sees outside its own group.
    """
    if own_QG.shape[1] == 0:
        # no queries: still a function of both, or the backward pass of an exchange behind them would be left out on this rank
        return own_QG.sum(1) + others_Q
    lowest = torch.finfo(own_QG.dtype).min
    rank_QG = scores_QG.masked_fill(~seen_QG, float("-inf"))
    rank_QG = torch.cat([torch.full_like(rank_QG[:, :1], float("inf")), rank_QG[:, 1:]], dim=1)
    order_QG = rank_QG.argsort(dim=1, descending=True, stable=True)
    target_QG, seen_QG, own_QG = (
        x.gather(1, order_QG) for x in (_target(scores_QG, seen_QG), seen_QG, own_QG)
    )
    own_QG = own_QG.masked_fill(~seen_QG, lowest)
    # row i of the triangle: the own group from its i-th passage on
    later_GG = torch.ones(own_QG.shape[1], own_QG.shape[1], dtype=torch.bool, device=own_QG.device).triu()
    own_from_QG = own_QG[:, None, :].masked_fill(~later_GG, lowest).logsumexp(2)
    rows_QG = torch.logaddexp(own_from_QG, others_Q[:, None]) - own_QG
    return (target_QG * rows_QG.masked_fill(~seen_QG, 0.0)).sum(1)
