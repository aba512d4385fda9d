"""Dense scores: one inner product per pair, in fp32 at least: a temperature of 0.02 magnifies rounding by
50."""

import torch
from torch import Tensor


def dense_scores(query_QD: Tensor, passage_PD: Tensor) -> Tensor:
    """scores_QP = ⟨query, passage⟩, in fp32 or wider (arXiv 2402.03216, section 3.2)."""
    dtype = torch.promote_types(torch.promote_types(query_QD.dtype, passage_PD.dtype), torch.float32)
    return query_QD.to(dtype) @ passage_PD.to(dtype).T
