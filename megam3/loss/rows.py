"""Which losses a query has and how they add up: one rule for whole matrices and for tiles. Pure.

With l(s) = −log softmax(s/τ)[positive] per query, over the columns it sees (arXiv 2402.03216, section 3.3):

    L     = Σ_h weight_h · l(s_h) / divisor                       h over dense, lexical, multi_vector, sum
    L'    = Σ_h distill_h · KD_h / heads,   KD_h = −Σ t · log softmax(s_h/τ),   t = softmax(s_sum/τ), constant
    total = (L + L') / 2                                          while distilling, else L

Every score has a temperature τ of its own where the recipe says so. A teacher in the records adds, per score,
weight · (−Σ y · log softmax over the own group), y = softmax(teacher scores of the group / its temperature),
with `kl_div`; `m3_kd_loss` stands in the place of l(s) unless the recipe keeps both (see distillation.py).

Rows are one rank's queries. Values are `row_scale` × local sum, row_scale = W / (queries of all ranks):
`megam3.dist.gather` derives why.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megam3.loss.settings import NAMES, LossSettings

RowLoss = Callable[[str], Tensor]
"""Name of a score → its loss per query, [Q]."""


@dataclass(frozen=True)
class LossTerms:
    """`total` carries the graph. The rest is for the log: averaged over ranks, each is the mean over all
    queries."""

    total: Tensor
    terms: dict[str, Tensor]
    """dense … sum (InfoNCE), teacher_dense …, distill_dense …; detached."""
    accuracy: dict[str, Tensor]
    """Share of queries whose positive scores above every other column they see, per score; detached."""


def collect_rows(
    settings: LossSettings,
    *,
    has_teacher: bool,
    distill: bool,
    infonce: RowLoss,
    taught: RowLoss,
    distilled: RowLoss,
) -> dict[str, Tensor]:
    """The losses per query that these settings ask for, named as in `LossTerms.terms`.

    Args:
        has_teacher: the batch carries teacher scores; without them a teacher in the settings changes nothing.
        distill: self-distillation is on in this step.
        infonce, taught, distilled: how to compute each kind.
    """
    is_taught = has_teacher and settings.teacher is not None
    rows: dict[str, Tensor] = {}
    for name in NAMES:
        # records without teacher scores train InfoNCE, whatever the settings ask of the others
        if name in settings.trained and (settings.keeps_infonce or not is_taught):
            rows[name] = infonce(name)
        if is_taught and name in settings.taught:
            rows[f"teacher_{name}"] = taught(name)
    for name in settings.distilled if distill else ():
        rows[f"distill_{name}"] = distilled(name)
    return rows


def add_up(
    rows: Mapping[str, Tensor], hits: Mapping[str, Tensor], settings: LossSettings, row_scale: float
) -> LossTerms:
    """Weigh the rows of `collect_rows` into the total; `hits` say per score where it ranks the positive
    first."""
    # hits are there also where no loss is trained, and the total must be a tensor all the same
    first = torch.zeros((), device=next(iter(hits.values())).device)
    distilled = torch.zeros_like(first)
    for name, row in rows.items():
        if name.startswith("distill_"):
            weight = getattr(settings.distill_weights, name.removeprefix("distill_"))
            distilled = distilled + weight / settings.distill_divisor * row.sum()
        else:
            table = settings.teacher_weights if name.startswith("teacher_") else settings.loss_weights
            weight = getattr(table, name.removeprefix("teacher_"))
            first = first + weight / settings.loss_divisor * row.sum()
    total = (first + distilled) / 2 if any(name.startswith("distill_") for name in rows) else first
    return LossTerms(
        total * row_scale,
        {name: row.detach().sum() * row_scale for name, row in rows.items()},
        {name: hit.sum() * row_scale for name, hit in hits.items()},
    )
