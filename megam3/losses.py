"""The unified loss over score matrices: InfoNCE per head and for their sum, self-distillation, teacher distillation. Pure.

With l(s) = −log softmax(s/τ)[positive] per query, over the columns its `allowed` row admits (arXiv 2402.03216, section 3.3):

    L     = Σ_h weight_h · l(s_h) / divisor                       h over dense, lexical, multi_vector, sum
    L'    = Σ_h distill_h · KD_h / 3,   KD_h = −Σ t · log softmax(s_h/τ),   t = softmax(s_sum/τ) without gradient
    total = (L + L') / 2                                          while distilling, else L

A teacher in the records changes each l(s): `kl_div` adds −Σ y · log softmax over the own group, y = softmax(teacher scores of the group);
`m3_kd_loss` replaces it by Σ_i y_i · l_i, where l_i has the group's i-th passage as its positive and no longer sees the i−1 before it
(positive first, then negatives by falling teacher score; the other columns stay throughout).

Rows are one rank's queries. Values are `row_scale` × local sum, row_scale = W / (queries of all ranks): `megam3.dist.gather` derives why.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megam3.config.schema import HeadWeights, LossWeights, UnifiedConfig
from megam3.teacher import TeacherGroups, kl_div_rows, m3_kd_rows, margin_mask, teacher_margin_mask

NAMES = ("dense", "lexical", "multi_vector", "sum")
"""Scores that have a loss, in the order of every table."""

M3_SUM = HeadWeights(dense=1.0, lexical=0.3, multi_vector=1.0)
"""w1, w2, w3 of the combined score: arXiv 2402.03216v4, section 3.3, and FlagEmbedding 1.4.2 (`ensemble_score`)."""
M3_LOSS = LossWeights(dense=1.0, lexical=0.1, multi_vector=1.0, sum=1.0)
"""λ1, λ2, λ3 and 1: arXiv 2402.03216v4, section 3.3, and FlagEmbedding 1.4.2 (`EncoderOnlyEmbedderM3Model.forward`)."""
M3_DISTILL = HeadWeights(dense=1.0, lexical=0.1, multi_vector=1.0)
"""The same λ on the distillation losses."""
ONES = HeadWeights(dense=1.0, lexical=1.0, multi_vector=1.0)
"""arXiv 2402.03216v1, section 3.3: every weight 1."""
ONES_AND_SUM = LossWeights(dense=1.0, lexical=1.0, multi_vector=1.0, sum=1.0)
"""The same, with the combined score."""
LOSS_DIVISOR = 4.0
"""L averages four losses (the later paper and the released code divide by their number, not by their weights)."""
DISTILL_DIVISOR = 3.0
"""L' averages three."""


@dataclass(frozen=True)
class LossSettings:
    """What `resolve_weights` makes of the recipe: every number the loss uses."""

    temperature: float
    sum_weights: HeadWeights | None
    """None: no combined score is needed."""
    loss_weights: LossWeights
    loss_divisor: float
    distill_weights: HeadWeights | None
    """None: no self-distillation in this run."""
    distill_start_step: int
    teacher: str | None
    false_negative_margin: float | None
    margin_source: str

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads that must be scored: those with a loss, a part in the sum, or a distillation."""
        tables = [self.loss_weights, self.sum_weights, self.distill_weights]
        return tuple(
            name for name in NAMES[:3] if any(table is not None and getattr(table, name) for table in tables)
        )

    @property
    def trained(self) -> tuple[str, ...]:
        """Scores with a loss of their own."""
        return tuple(name for name in NAMES if getattr(self.loss_weights, name))

    @property
    def distilled(self) -> tuple[str, ...]:
        """Heads that the combined score teaches, once distillation has begun."""
        return tuple(
            name
            for name in NAMES[:3]
            if self.distill_weights is not None and getattr(self.distill_weights, name)
        )

    def distills(self, step: int) -> bool:
        """Whether self-distillation is on after `step` optimizer steps."""
        return self.distill_weights is not None and step >= self.distill_start_step


def resolve_weights(config: UnifiedConfig) -> LossSettings:
    """Preset plus the recipe's own tables. `joint` has neither sum nor distillation, whatever else is set."""
    joint = config.preset == "joint"
    sums, losses, distills = (
        (M3_SUM, M3_LOSS, M3_DISTILL) if config.preset == "m3" else (ONES, ONES_AND_SUM, ONES)
    )
    losses = config.loss_weights or losses
    sums = config.sum_weights or sums
    if joint:
        losses = losses.model_copy(update={"sum": 0.0})
        # the sum serves the margin rule alone here, and heads out of training stay out of it
        sums = HeadWeights(
            **{name: getattr(sums, name) if getattr(losses, name) else 0.0 for name in NAMES[:3]}
        )
    distills_at_all = config.self_distill and not joint
    margin_on_sum = config.false_negative_margin is not None and config.false_negative_margin_source == "sum"
    return LossSettings(
        temperature=config.temperature,
        sum_weights=sums if losses.sum or distills_at_all or margin_on_sum else None,
        loss_weights=losses,
        loss_divisor=1.0 if joint else LOSS_DIVISOR,
        distill_weights=(config.distill_weights or distills) if distills_at_all else None,
        distill_start_step=config.self_distill_start_step,
        teacher=config.teacher,
        false_negative_margin=config.false_negative_margin,
        margin_source=config.false_negative_margin_source,
    )


@dataclass(frozen=True)
class LossTerms:
    """`total` carries the graph. The rest is for the log: averaged over ranks, each is the mean over all queries."""

    total: Tensor
    terms: dict[str, Tensor]
    """dense … sum (InfoNCE), teacher_dense …, distill_dense …; detached."""
    accuracy: dict[str, Tensor]
    """Share of queries whose positive scores above every other column they see, per score; detached."""


def _narrow(
    scores: Mapping[str, Tensor],
    positive_Q: Tensor,
    allowed_QP: Tensor,
    settings: LossSettings,
    teacher: TeacherGroups | None,
) -> Tensor:
    """`allowed_QP` without the columns the margin rule leaves out."""
    if settings.false_negative_margin is None:
        return allowed_QP
    if settings.margin_source == "sum":
        sum_QP = scores["sum"].detach()
        return allowed_QP & ~margin_mask(
            sum_QP, sum_QP.gather(1, positive_Q[:, None]).squeeze(1), settings.false_negative_margin
        )
    if teacher is None:
        return allowed_QP
    return allowed_QP & ~teacher_margin_mask(teacher, allowed_QP.shape[1], settings.false_negative_margin)


def _taught(logits_QP: Tensor, teacher: TeacherGroups, allowed_QP: Tensor, kind: str) -> Tensor:
    """Teacher distillation of one score, per query."""
    seen_QG = teacher.exists_QG & allowed_QP.gather(1, teacher.columns_QG)
    own_QG = logits_QP.gather(1, teacher.columns_QG)
    if kind == "kl_div":
        return kl_div_rows(own_QG, teacher.scores_QG, seen_QG)
    others_Q = logits_QP.scatter(1, teacher.columns_QG, torch.finfo(logits_QP.dtype).min).logsumexp(1)
    return m3_kd_rows(own_QG, others_Q, teacher.scores_QG, seen_QG)


def assemble(
    rows: Mapping[str, Tensor], hits: Mapping[str, Tensor], settings: LossSettings, row_scale: float
) -> LossTerms:
    """Weigh per-query losses, named as in `LossTerms.terms`, into the total; `hits` say where each score ranks its positive first."""
    first = torch.zeros((), device=next(iter(hits.values())).device)
    distilled = torch.zeros_like(first)
    for name, row in rows.items():
        if name.startswith("distill_"):
            distilled = (
                distilled
                + getattr(settings.distill_weights, name.removeprefix("distill_"))
                / DISTILL_DIVISOR
                * row.sum()
            )
        else:
            first = (
                first
                + getattr(settings.loss_weights, name.removeprefix("teacher_"))
                / settings.loss_divisor
                * row.sum()
            )
    total = (first + distilled) / 2 if any(name.startswith("distill_") for name in rows) else first
    return LossTerms(
        total * row_scale,
        {name: row.detach().sum() * row_scale for name, row in rows.items()},
        {name: hit.sum() * row_scale for name, hit in hits.items()},
    )


def unified_loss(
    scores: Mapping[str, Tensor],
    positive_column_Q: Tensor,
    allowed_QP: Tensor,
    settings: LossSettings,
    row_scale: float,
    distill: bool,
    teacher: TeacherGroups | None = None,
) -> LossTerms:
    """The loss of one rank's queries.

    Args:
        scores: dense, lexical, multi_vector, sum (those the settings need) as scores_QP, before the temperature.
        positive_column_Q: int64; allowed there.
        allowed_QP: bool, which columns each softmax sees.
        row_scale: W / number of queries over all ranks.
        distill: self-distillation on (`settings.distills(step)`).
        teacher: needed when `settings.teacher` is set and the batch carries scores; without it the plain loss is used.
    """
    allowed_QP = _narrow(scores, positive_column_Q, allowed_QP, settings, teacher)
    # the lowest finite number, not −inf: 0 · −inf in the distillation would be NaN
    lowest = {name: torch.finfo(x.dtype).min for name, x in scores.items()}
    logits = {
        name: (x / settings.temperature).masked_fill(~allowed_QP, lowest[name]) for name, x in scores.items()
    }
    trained, distilled = settings.trained, settings.distilled if distill else ()
    needed = {*trained, *distilled, *(["sum"] if distilled else [])}
    log_probs = {name: torch.log_softmax(logits[name], dim=1) for name in NAMES if name in needed}
    rows: dict[str, Tensor] = {}
    for name in trained:
        if teacher is None or settings.teacher != "m3_kd_loss":
            rows[name] = -log_probs[name].gather(1, positive_column_Q[:, None]).squeeze(1)
        if teacher is not None and settings.teacher is not None:
            rows[f"teacher_{name}"] = _taught(logits[name], teacher, allowed_QP, settings.teacher)
    if distilled:
        target_QP = log_probs["sum"].detach().exp()
        rows.update({f"distill_{name}": -(target_QP * log_probs[name]).sum(1) for name in distilled})
    # a tie is no hit: a dead head, which scores everything alike, must not look accurate
    level = {
        name: x.detach() >= x.detach().gather(1, positive_column_Q[:, None]) for name, x in logits.items()
    }
    return assemble(rows, {name: x.sum(1) == 1 for name, x in level.items()}, settings, row_scale)
