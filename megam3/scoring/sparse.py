"""Sparse-dense products in compressed rows (CSR): MKL on a CPU, cuSPARSE on CUDA; several times faster than
`index_add_` over many rows."""

import warnings

import torch
from torch import Tensor

# torch says once per process, at its first CSR tensor, that the layout is in beta: spend that notice here, or
# every rank prints it
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(
        torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1)
    )


def csr_matrix(crow: Tensor, columns: Tensor, values: Tensor, num_columns: int) -> Tensor:
    """[rows, num_columns] with `values` at `columns`, row i holding entries crow[i] … crow[i+1]-1."""
    # the layout was just built by us; checking it would cost as much as using it
    return torch.sparse_csr_tensor(
        crow, columns, values, (crow.shape[0] - 1, num_columns), check_invariants=False
    )


def csr_product(crow: Tensor, columns: Tensor, values: Tensor, dense_XC: Tensor) -> Tensor:
    """Sparse [R, X] times dense [X, C]."""
    if 0 in (crow.shape[0] - 1, values.shape[0], *dense_XC.shape):
        return dense_XC.new_zeros(crow.shape[0] - 1, dense_XC.shape[1])
    return csr_matrix(crow, columns, values, dense_XC.shape[0]) @ dense_XC


def transposed_csr(columns_KP: Tensor, values_KP: Tensor, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Transpose of the matrix [K, num_columns] whose row k holds values_KP[k] at columns_KP[k]: crow, columns
    (= k), values."""
    sorted_columns, order = torch.sort(columns_KP.flatten(), stable=True)
    edges = torch.arange(num_columns + 1, dtype=sorted_columns.dtype, device=order.device)
    crow = torch.searchsorted(sorted_columns, edges, out_int32=True)
    rows = torch.div(order, columns_KP.shape[1], rounding_mode="floor").to(torch.int32)
    return crow, rows, values_KP.flatten()[order]


def transposed_pattern(rows_Z: Tensor, columns_Z: Tensor, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Transpose of the matrix with entries at (rows_Z, columns_Z), rows ascending: crow, columns, and the
    order that sorts the values."""
    sorted_columns, order = torch.sort(columns_Z, stable=True)
    edges = torch.arange(num_columns + 1, dtype=sorted_columns.dtype, device=order.device)
    return torch.searchsorted(sorted_columns, edges, out_int32=True), rows_Z[order].to(torch.int32), order


def sampled_product(crow: Tensor, columns: Tensor, left_RC: Tensor, right_CX: Tensor) -> Tensor:
    """Entries of left @ right at the places of a sparse [R, X] only, in its order."""
    if columns.shape[0] == 0 or left_RC.shape[1] == 0:
        return left_RC.new_zeros(columns.shape[0])
    places = csr_matrix(crow, columns, left_RC.new_zeros(columns.shape[0]), right_CX.shape[1])
    return torch.sparse.sampled_addmm(places, left_RC, right_CX, beta=0.0).values()
