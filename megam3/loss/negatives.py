"""Which passages each query's softmax may see, in O(Q + P) numbers, spelled out for any tile of the score
matrix.

Columns are the passages of all ranks in rank order (of this rank only, when in-batch negatives are off: a
query sees its own group then). A column is left out when it is not the query's drawn positive and

    - in-batch negatives are off and it belongs to another group, or
    - its text equals a known positive of the query (equal hashes): the same page under another query, a
    second positive
      that another query drew, or a hard negative that is none.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megam3.batch import RetrievalBatch
from megam3.dist import comm
from megam3.dist.gather import gather_rows

ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """Rows are some queries, columns all passages they are scored with."""

    positive_column_Q: Tensor
    """int64: first column of the query's own group, which is its positive."""
    group_stop_Q: Tensor
    """int64: one past the own group's last column."""
    passage_hash_P: Tensor
    """int64: hash of each column's text."""
    known_positive_hash_QM: Tensor
    """int64: hashes of the texts known to answer the query, the drawn positive first; rows with fewer repeat
    one."""
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

    def visible(self, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """bool tile: whether each of these columns takes part in the softmax of each of these rows.

        The drawn positive always does.
        """
        positive_Q1 = self.positive_column_Q[rows, None]
        column_P = torch.arange(self.num_passages, device=positive_Q1.device)[columns]
        if self.in_batch_negatives:
            shape = (positive_Q1.shape[0], column_P.shape[0])
            visible_QP = torch.ones(shape, dtype=torch.bool, device=column_P.device)
        else:
            visible_QP = self.in_own_group(rows, columns)
        for known_Q in self._known(rows):
            visible_QP &= self.passage_hash_P[columns] != known_Q[:, None]
        return visible_QP | (column_P == positive_Q1)

    def visible_in_group(self) -> Tensor:
        """bool: the same for `group_columns`, each query's own group side by side."""
        columns_QG, exists_QG = self.group_columns()
        visible_QG = exists_QG.clone()
        for known_Q in self._known(ALL):
            visible_QG &= self.passage_hash_P[columns_QG] != known_Q[:, None]
        visible_QG[:, :1] = True
        return visible_QG

    def in_own_group(self, rows: slice, columns: slice) -> Tensor:
        """bool tile: whether a column belongs to the row's own group."""
        start_Q1, stop_Q1 = self.positive_column_Q[rows, None], self.group_stop_Q[rows, None]
        column_P = torch.arange(self.num_passages, device=start_Q1.device)[columns]
        return (column_P >= start_Q1) & (column_P < stop_Q1)

    def group_columns(self) -> tuple[Tensor, Tensor]:
        """columns_QG of each query's own group, the last one repeated in shorter groups, and exists_QG, which
        are there."""
        sizes_Q = self.group_stop_Q - self.positive_column_Q
        widest = int(sizes_Q.max()) if self.num_queries else 0
        place_G = torch.arange(widest, device=sizes_Q.device)
        columns_QG = torch.minimum(self.positive_column_Q[:, None] + place_G, self.group_stop_Q[:, None] - 1)
        return columns_QG, place_G < sizes_Q[:, None]

    def to(self, device: torch.device | str) -> "Negatives":
        """The same on `device`."""
        return replace(
            self,
            positive_column_Q=self.positive_column_Q.to(device),
            group_stop_Q=self.group_stop_Q.to(device),
            passage_hash_P=self.passage_hash_P.to(device),
            known_positive_hash_QM=self.known_positive_hash_QM.to(device),
        )

    def of_all_ranks(self, counts: tuple[int, ...]) -> "Negatives":
        """Rows of every rank's queries, `counts` of each; columns are all ranks' already. Collective."""
        most = comm.max_over_ranks(int(self.known_positive_hash_QM.shape[1]))
        known_QM = self.known_positive_hash_QM
        # ranks pad to one width by repeating the drawn positive, which changes no mask
        padding_QM = known_QM[:, :1].expand(-1, most - known_QM.shape[1])
        return replace(
            self,
            positive_column_Q=gather_rows(self.positive_column_Q, counts),
            group_stop_Q=gather_rows(self.group_stop_Q, counts),
            known_positive_hash_QM=gather_rows(torch.cat([known_QM, padding_QM], dim=1), counts),
        )

    def _known(self, rows: slice) -> tuple[Tensor, ...]:
        """Known positives one by one: a tile's mask never grows to [Q, P, M]."""
        return self.known_positive_hash_QM[rows].unbind(1) if self.mask_false_negatives else ()


def find_negatives(
    batch: RetrievalBatch, mask_false_negatives: bool, passage_counts: tuple[int, ...] | None = None
) -> Negatives:
    """Negatives of this rank's queries, on the CPU.

    Args:
        batch: this rank's share; its flag `in_batch_negatives` is the same on all ranks, because batches are
            homogeneous in their dataset.
        mask_false_negatives: leave out columns whose text equals a known positive.
        passage_counts: passages per rank, when columns are every rank's passages (hashes are exchanged then);
            None: this rank's only.
    """
    is_global = passage_counts is not None
    first = sum(passage_counts[: comm.rank()]) if passage_counts is not None else 0
    hashes_P = gather_rows(batch.passage_hashes_P, passage_counts) if is_global else batch.passage_hashes_P
    starts_Q, stops_Q = batch.group_offsets_Q1[:-1], batch.group_offsets_Q1[1:]
    known_QM = batch.passage_hashes_P[starts_Q][:, None]
    if batch.known_positive_hashes_QM is not None:
        known_QM = torch.cat([known_QM, batch.known_positive_hashes_QM], dim=1)
    return Negatives(
        positive_column_Q=starts_Q + first,
        group_stop_Q=stops_Q + first,
        passage_hash_P=hashes_P,
        known_positive_hash_QM=known_QM,
        in_batch_negatives=batch.in_batch_negatives,
        mask_false_negatives=mask_false_negatives,
    )


def group_rows(values_P: Tensor, group_offsets_Q1: Tensor, fill: float) -> Tensor:
    """Per-passage numbers of one rank (teacher scores) as values_QG, positive first; shorter groups end in
    `fill`."""
    sizes_Q = group_offsets_Q1[1:] - group_offsets_Q1[:-1]
    widest = int(sizes_Q.max()) if sizes_Q.numel() else 0
    place_G = torch.arange(widest)
    index_QG = (group_offsets_Q1[:-1, None] + place_G).clamp(max=max(values_P.shape[0] - 1, 0))
    return torch.where(
        place_G < sizes_Q[:, None], values_P[index_QG], torch.full((), fill, dtype=values_P.dtype)
    )
