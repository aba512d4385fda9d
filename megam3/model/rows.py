"""Row selection without repeats, whose backward is a copy.

torch's index_select adds gradients row by row, since rows may repeat; on a CPU that is several times slower
than a copy.
"""

import torch
from torch import Tensor


class _UniqueRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_TD: Tensor, index_K: Tensor) -> Tensor:
        ctx.save_for_backward(index_K)
        ctx.num_rows = rows_TD.shape[0]
        return rows_TD.index_select(0, index_K)

    @staticmethod
    def backward(ctx, grad_KD: Tensor) -> tuple[Tensor, None]:
        (index_K,) = ctx.saved_tensors
        grad_TD = grad_KD.new_zeros(ctx.num_rows, *grad_KD.shape[1:])
        return grad_TD.index_copy_(0, index_K, grad_KD), None


def select_unique_rows(rows_TD: Tensor, index_K: Tensor) -> Tensor:
    """Rows `index_K` of `rows_TD`; no index may occur twice (the later gradient would replace the earlier
    one)."""
    return _UniqueRows.apply(rows_TD, index_K)
