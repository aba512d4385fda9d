"""Which passages each query's softmax may see, held in O(Q + P) numbers and spelled out for any tile of the score matrix.

Columns are the passages of all ranks in rank order (of this rank only, when in-batch negatives are off: a query sees its own group then).
A column is left out when it is not the query's positive and
    - in-batch negatives are off and it belongs to another group, or
    - its text equals the positive's (equal hashes): the same page under another query, or a hard negative that is none.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megam3.batch import RetrievalBatch
from megam3.dist import comm
from megam3.dist.gather import gather_rows

ALL = slice(None)


@dataclass(frozen=True)
class Candidates:
    """Rows are some queries, columns all passages they are scored with."""

    positive_column_Q: Tensor
    """int64: first column of the query's own group, which is its positive."""
    group_stop_Q: Tensor
    """int64: one past the own group's last column."""
    passage_hash_P: Tensor
    """int64: hash of each column's text."""
    positive_hash_Q: Tensor
    """int64: hash of the positive's text."""
    in_batch_negatives: bool = True
    mask_false_negatives: bool = True

    @property
    def num_queries(self) -> int:
        """Q."""
        return int(self.positive_column_Q.shape[0])

    @property
    def num_passages(self) -> int:
        """P."""
        return int(self.passage_hash_P.shape[0])

    def allowed(self, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """bool tile: whether each of these columns takes part in the softmax of each of these rows; the positive always does."""
        positive_Q1 = self.positive_column_Q[rows, None]
        column_P = torch.arange(self.num_passages, device=positive_Q1.device)[columns]
        if self.in_batch_negatives:
            allowed_QP = torch.ones(
                positive_Q1.shape[0], column_P.shape[0], dtype=torch.bool, device=column_P.device
            )
        else:
            allowed_QP = (column_P >= positive_Q1) & (column_P < self.group_stop_Q[rows, None])
        if self.mask_false_negatives:
            allowed_QP &= self.passage_hash_P[columns] != self.positive_hash_Q[rows, None]
        return allowed_QP | (column_P == positive_Q1)

    def group_columns(self) -> tuple[Tensor, Tensor]:
        """columns_QG of each query's own group, the last one repeated in shorter groups, and exists_QG, which of them are there."""
        sizes_Q = self.group_stop_Q - self.positive_column_Q
        widest = int(sizes_Q.max()) if self.num_queries else 0
        place_G = torch.arange(widest, device=sizes_Q.device)
        columns_QG = torch.minimum(self.positive_column_Q[:, None] + place_G, self.group_stop_Q[:, None] - 1)
        return columns_QG, place_G < sizes_Q[:, None]

    def to(self, device: torch.device | str) -> "Candidates":
        """The same on `device`."""
        return replace(
            self,
            positive_column_Q=self.positive_column_Q.to(device),
            group_stop_Q=self.group_stop_Q.to(device),
            passage_hash_P=self.passage_hash_P.to(device),
            positive_hash_Q=self.positive_hash_Q.to(device),
        )


def find_candidates(
    batch: RetrievalBatch, mask_false_negatives: bool, passage_counts: tuple[int, ...] | None = None
) -> Candidates:
    """Candidates of this rank's queries, on the CPU.

    Args:
        batch: this rank's share; its flag `in_batch_negatives` is the same on all ranks, because batches are homogeneous in their dataset.
        mask_false_negatives: leave out columns whose text equals the positive's.
        passage_counts: passages per rank, when columns are every rank's passages (hashes are exchanged then); None: this rank's only.
    """
    first = 0 if passage_counts is None else sum(passage_counts[: comm.rank()])
    hashes_P = (
        batch.passage_hashes_P
        if passage_counts is None
        else gather_rows(batch.passage_hashes_P, passage_counts)
    )
    starts_Q, stops_Q = batch.group_offsets_Q1[:-1], batch.group_offsets_Q1[1:]
    return Candidates(
        starts_Q + first,
        stops_Q + first,
        hashes_P,
        batch.passage_hashes_P[starts_Q],
        batch.in_batch_negatives,
        mask_false_negatives,
    )


def group_rows(values_P: Tensor, group_offsets_Q1: Tensor, fill: float) -> Tensor:
    """Per-passage numbers of one rank (teacher scores) as values_QG, positive first; shorter groups end in `fill`."""
    sizes_Q = group_offsets_Q1[1:] - group_offsets_Q1[:-1]
    widest = int(sizes_Q.max()) if sizes_Q.numel() else 0
    place_G = torch.arange(widest)
    index_QG = (group_offsets_Q1[:-1, None] + place_G).clamp(max=max(values_P.shape[0] - 1, 0))
    return torch.where(
        place_G < sizes_Q[:, None], values_P[index_QG], torch.full((), fill, dtype=values_P.dtype)
    )
