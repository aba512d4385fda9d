"""Every number of the unified loss, resolved from the recipe: a preset, and what the recipe says over it.

Presets and their sources stand in the schema. A head that `objective.heads` leaves out has no weight
anywhere, and the averages are taken over the losses that remain.
"""

from dataclasses import dataclass
from typing import Literal

from megam3.config.objective import UnifiedConfig
from megam3.config.weights import HEADS, HeadWeights, LossWeights, preset_weights

NAMES = (*HEADS, "sum")
"""Scores that have a loss, in the order of every table."""


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What `resolve_settings` makes of the recipe: every number the loss uses."""

    temperatures: dict[str, float]
    """By score: what divides it before the softmax."""
    maxsim: Literal["mean", "sum"]
    """Reduction of the multi-vector score over query rows."""
    sum_weights: HeadWeights | None
    """None: no combined score is needed."""
    loss_weights: LossWeights
    loss_divisor: float
    """L averages four losses with three heads and the sum (the later paper and the released code divide by
    their number, not by their weights); `joint` adds them up."""
    distill_weights: HeadWeights | None
    """None: no self-distillation in this run."""
    distill_divisor: float
    """L' averages one distillation loss a head."""
    distill_start_step: int
    teacher: Literal["kl_div", "m3_kd_loss"] | None
    teacher_temperature: float
    """Divides the teacher's scores."""
    student_temperature: float | None
    """Of every score while the teacher looks at it; None: the score's own."""
    teacher_weights: LossWeights
    keeps_infonce: bool
    """Whether the InfoNCE stays beside the teacher's loss."""
    false_negative_margin: float | None
    margin_source: Literal["sum", "teacher"]
    matryoshka: dict[int, float]
    """Weight of the loss of dense vectors cut at so many entries, the mean's divisor included; empty: off."""
    both_directions: bool
    """Whether drawn positives rank the queries too, by the dense head."""

    @property
    def heads(self) -> tuple[str, ...]:
        """Heads that must be scored: those with a loss, a part in the sum, or a distillation."""
        tables = [self.loss_weights, self.sum_weights, self.distill_weights]
        tables += [self.teacher_weights] if self.teacher else []
        return tuple(name for name in HEADS if any(t is not None and getattr(t, name) for t in tables))

    @property
    def scores(self) -> tuple[str, ...]:
        """Scores that are formed: the heads, then their sum where it is needed."""
        return (*self.heads, *(["sum"] if self.sum_weights is not None else []))

    @property
    def trained(self) -> tuple[str, ...]:
        """Scores with a loss of their own."""
        return tuple(name for name in NAMES if getattr(self.loss_weights, name))

    @property
    def taught(self) -> tuple[str, ...]:
        """Scores that the records' teacher teaches."""
        return tuple(name for name in NAMES if self.teacher and getattr(self.teacher_weights, name))

    @property
    def distilled(self) -> tuple[str, ...]:
        """Heads that the combined score teaches, once distillation has begun."""
        weights = self.distill_weights
        return tuple(name for name in HEADS if weights is not None and getattr(weights, name))

    def distills(self, step: int) -> bool:
        """Whether self-distillation is on after `step` optimizer steps."""
        return self.distill_weights is not None and step >= self.distill_start_step


def resolve_settings(config: UnifiedConfig) -> LossSettings:
    """Preset plus the recipe's own tables.

    `joint`, and a single head, have neither sum nor distillation, whatever else is set: the sum of one head
    is that head.
    """
    alone = config.preset == "joint" or len(config.heads) == 1
    preset = preset_weights(config.preset)
    losses: LossWeights = config.loss_weights or LossWeights(**preset["loss_weights"].model_dump())
    sums = config.sum_weights or preset["sum_weights"]
    distills = config.distill_weights or preset["distill_weights"]
    absent = {name: 0.0 for name in HEADS if name not in config.heads}
    taught = (config.teacher_weights or losses).model_copy(update=absent)
    losses = losses.model_copy(update=absent)
    sums = sums.model_copy(update=absent)
    distills = distills.model_copy(update=absent)
    if alone:
        losses = losses.model_copy(update={"sum": 0.0})
        taught = taught.model_copy(update={"sum": 0.0})
        # the sum serves the margin rule alone here, and heads out of training stay out of it
        sums = HeadWeights(**{name: getattr(sums, name) if getattr(losses, name) else 0.0 for name in HEADS})
    has_distillation = config.self_distill and not alone
    margin_on_sum = config.false_negative_margin is not None and config.false_negative_margin_source == "sum"
    taught_sum = config.teacher is not None and taught.sum > 0
    needs_sum = losses.sum or has_distillation or margin_on_sum or taught_sum
    keeps_infonce = config.teacher_keeps_infonce
    dims = config.matryoshka_dims or []
    cut_weights = config.matryoshka_weights or [1.0] * len(dims)
    return LossSettings(
        temperatures={name: getattr(config.temperatures, name) or config.temperature for name in NAMES},
        maxsim=config.maxsim,
        sum_weights=sums if needs_sum else None,
        loss_weights=losses,
        loss_divisor=1.0 if alone else len(config.heads) + 1.0,
        distill_weights=distills if has_distillation else None,
        distill_divisor=float(len(config.heads)),
        distill_start_step=config.self_distill_start_step,
        teacher=config.teacher,
        teacher_temperature=config.teacher_temperature,
        student_temperature=config.teacher_student_temperature,
        teacher_weights=taught,
        keeps_infonce=config.teacher != "m3_kd_loss" if keeps_infonce is None else keeps_infonce,
        false_negative_margin=config.false_negative_margin,
        margin_source=config.false_negative_margin_source,
        matryoshka={dim: weight / len(dims) for dim, weight in zip(dims, cut_weights, strict=True)},
        both_directions=config.both_directions,
    )
