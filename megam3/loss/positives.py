"""A query's drawn positives, and InfoNCE with several of them. Pure.

With D drawn positives, l = (1/D) Σ_i [log(e^{p_i} + Σ e^{n}) − p_i] over the D positives p_i and all
negatives n that the query sees: each positive is told from the negatives alone. That is L_out of
supervised contrastive learning (arXiv 2004.11362, equation 2, the mean outside the logarithm) with the other
positives taken out of the denominator, where they would push each other away. D = 1: the usual InfoNCE.

Logits [3., 1. | 0., 0.] of a query with two positives and two negatives, log Σ e^n = log 2:

    l = ((log(e³ + 2) − 3) + (log(e¹ + 2) − 1)) / 2

What has no label sees all drawn positives at once, as columns like any others: self-distillation and
`kl_div` compare distributions over all that is seen; `m3_kd_loss` puts the positives first, by falling
teacher score.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from megam3.dist import comm


@dataclass(frozen=True)
class Positives:
    """Where the drawn positives of some queries are: side by side, from the group's first column on."""

    first_column_Q: Tensor
    """int64."""
    counts: tuple[int, ...] = ()
    """How many each query drew, on the host; () where each drew one."""

    @property
    def most(self) -> int:
        """The largest number of drawn positives of a query, D."""
        return max(self.counts, default=1)

    @property
    def counts_Q(self) -> Tensor:
        """int64: how many each query drew."""
        if not self.counts:
            return torch.ones_like(self.first_column_Q)
        return comm.copy_pinned(torch.tensor(self.counts), self.first_column_Q.device)

    def is_positive(self, num_places: int) -> Tensor:
        """bool [Q, places]: which places of the own group, side by side, hold a drawn positive."""
        place_G = torch.arange(num_places, device=self.first_column_Q.device)
        return place_G < self.counts_Q[:, None]

    def rows(self) -> tuple[Tensor, Tensor]:
        """(query, place among its positives) of every drawn positive, query by query, both int64."""
        query_Q = torch.arange(self.first_column_Q.shape[0], device=self.first_column_Q.device)
        if not self.counts:
            return query_Q, torch.zeros_like(query_Q)
        counts_Q, total = self.counts_Q, sum(self.counts)
        query_R = torch.repeat_interleave(query_Q, counts_Q, output_size=total)
        starts_Q = counts_Q.cumsum(0) - counts_Q
        return query_R, torch.arange(total, device=query_Q.device) - starts_Q[query_R]

    def columns(self) -> tuple[Tensor, Tensor]:
        """columns_QD of the drawn positives, the last one repeated where a query has fewer, and exists_QD."""
        place_D = torch.arange(self.most, device=self.first_column_Q.device)
        last_Q1 = self.counts_Q[:, None] - 1
        # an index has to exist where a positive does not; what is read there is masked out
        return self.first_column_Q[:, None] + torch.minimum(place_D, last_Q1), place_D <= last_Q1


def infonce_rows(positive_QD: Tensor, exists_QD: Tensor, negatives_Q: Tensor) -> Tensor:
    """l of every query.

    Args:
        positive_QD: logits of the drawn positives.
        exists_QD: which places hold one.
        negatives_Q: log Σ exp over the negatives that the query sees.
    """
    # in logarithms throughout: at a temperature of 0.02 exp of a logit reaches e^50
    rows_QD = torch.logaddexp(negatives_Q[:, None], positive_QD) - positive_QD
    return rows_QD.masked_fill(~exists_QD, 0.0).sum(1) / exists_QD.sum(1)


def hit_rows(positive_QD: Tensor, exists_QD: Tensor, highest_Q: Tensor) -> Tensor:
    """Share of a query's drawn positives that score above the highest of its negatives."""
    above_QD = (positive_QD.detach() > highest_Q.detach()[:, None]) & exists_QD
    return above_QD.sum(1) / exists_QD.sum(1)


def highest_of(values_QD: Tensor, exists_QD: Tensor) -> Tensor:
    """The highest of each row's existing values, kept [Q, 1] and without a graph."""
    lowest = torch.finfo(values_QD.dtype).min
    return values_QD.detach().masked_fill(~exists_QD, lowest).amax(1, keepdim=True)
