"""Which passages each query's softmax may see, in O(Q + P) numbers, spelled out for any tile of the score
matrix.

Columns are the passages of all ranks in rank order (of this rank only, when in-batch negatives are off: a
query sees its own group then). A column is left out when it is not one of the query's drawn positives and

    - in-batch negatives are off and it belongs to another group, or
    - its text equals a known positive of the query (equal hashes): the same page under another query, a
      second positive that another query drew, the positive of another row that asks the same question, or a
      hard negative that is none.

A query may draw several positives, which then open its group. Each is a column of its own, and no negative of
the others: `positives.py` keeps them apart in InfoNCE.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megam3.batch import RetrievalBatch
from megam3.dist import comm
from megam3.dist.gather import gather_rows
from megam3.loss.positives import Positives
from megam3.scoring.combine import RankCounts

ALL = slice(None)


@dataclass(frozen=True, kw_only=True)
class Negatives:
    """Rows are some queries, columns all passages they are scored with."""

    positive_column_Q: Tensor
    """int64: first column of the query's own group, which is its (first) drawn positive."""
    group_stop_Q: Tensor
    """int64: one past the own group's last column."""
    passage_hash_P: Tensor
    """int64: hash of each column's text."""
    known_positive_hash_QM: Tensor
    """int64: hashes of the texts known to answer the query, the drawn positive first; rows with fewer repeat
    one."""
    in_batch_negatives: bool = True
    mask_false_negatives: bool = True
    group_sizes: tuple[int, ...] = ()
    """Columns of each row's own group, on the host; read from the device where nobody gives them."""
    positive_counts: tuple[int, ...] = ()
    """Drawn positives that open each row's own group, on the host; () where every row has one."""
    answered_hash_PM: Tensor | None = None
    """int64: where columns are queries, hashes of the texts known to answer each; a row whose own text is
    among them does not see that column."""
    own_row_only_P: Tensor | None = None
    """bool: columns that repeat another for the sake of one row, and that other rows do not see."""

    def __post_init__(self) -> None:
        if len(self.group_sizes) != self.num_queries:
            sizes = (self.group_stop_Q - self.positive_column_Q).tolist()
            object.__setattr__(self, "group_sizes", tuple(sizes))
        if max(self.positive_counts, default=1) == 1:
            object.__setattr__(self, "positive_counts", ())

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

        The drawn positives always do.
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
        if self.answered_hash_PM is not None and self.mask_false_negatives:
            own_Q1 = self.known_positive_hash_QM[rows, :1]
            for answered_P in self.answered_hash_PM[columns].unbind(1):
                visible_QP &= answered_P != own_Q1
        if self.own_row_only_P is not None:
            visible_QP &= ~self.own_row_only_P[columns]
        if not self.positive_counts:
            return visible_QP | (column_P == positive_Q1)
        stop_Q1 = positive_Q1 + self.positives().counts_Q[rows, None]
        return visible_QP | ((column_P >= positive_Q1) & (column_P < stop_Q1))

    def visible_in_group(self) -> Tensor:
        """bool: the same for `group_columns`, each query's own group side by side."""
        columns_QG, exists_QG = self.group_columns()
        visible_QG = exists_QG.clone()
        for known_Q in self._known(ALL):
            visible_QG &= self.passage_hash_P[columns_QG] != known_Q[:, None]
        return visible_QG | self.positives().is_positive(columns_QG.shape[1])

    def in_own_group(self, rows: slice, columns: slice) -> Tensor:
        """bool tile: whether a column belongs to the row's own group."""
        start_Q1, stop_Q1 = self.positive_column_Q[rows, None], self.group_stop_Q[rows, None]
        column_P = torch.arange(self.num_passages, device=start_Q1.device)[columns]
        return (column_P >= start_Q1) & (column_P < stop_Q1)

    def group_columns(self) -> tuple[Tensor, Tensor]:
        """columns_QG of each query's own group, the last one repeated in shorter groups, and exists_QG, which
        are there."""
        sizes_Q = self.group_stop_Q - self.positive_column_Q
        place_G = torch.arange(max(self.group_sizes, default=0), device=sizes_Q.device)
        columns_QG = torch.minimum(self.positive_column_Q[:, None] + place_G, self.group_stop_Q[:, None] - 1)
        return columns_QG, place_G < sizes_Q[:, None]

    def positives(self) -> Positives:
        """Where each query's drawn positives are."""
        return Positives(self.positive_column_Q, self.positive_counts)

    def of_all_ranks(self, counts: tuple[int, ...]) -> "Negatives":
        """Rows of every rank's queries, `counts` of each; columns are all ranks' already. Collective."""
        most = comm.max_over_ranks(int(self.known_positive_hash_QM.shape[1]))
        return replace(
            self,
            positive_column_Q=gather_rows(self.positive_column_Q, counts),
            group_stop_Q=gather_rows(self.group_stop_Q, counts),
            # nobody asks for the groups of other ranks' queries: tiles leave out all of every own group
            group_sizes=(0,) * sum(counts),
            positive_counts=(),
            known_positive_hash_QM=gather_rows(widen(self.known_positive_hash_QM, most), counts),
        )

    def _known(self, rows: slice) -> tuple[Tensor, ...]:
        """Known positives one by one: a tile's mask never grows to [Q, P, M]."""
        return self.known_positive_hash_QM[rows].unbind(1) if self.mask_false_negatives else ()


def find_negatives(
    batch: RetrievalBatch, mask_false_negatives: bool, counts: RankCounts | None = None
) -> Negatives:
    """Negatives of this rank's queries, where the batch is.

    Args:
        batch: this rank's share; its flag `in_batch_negatives` is the same on all ranks, because batches are
            homogeneous in their dataset.
        mask_false_negatives: leave out columns whose text equals a known positive.
        counts: of all ranks, with the queries' hashes where the batch has them (collective): columns are
            every rank's passages then, unless in-batch negatives are off, and rows of the same query text, on
            any rank, share their known positives. None: this rank alone.
    """
    first, hashes_P = 0, batch.passage_hashes_P
    if counts is not None and batch.in_batch_negatives:
        first, hashes_P = counts.first_passage, gather_rows(hashes_P, counts.passages)
    starts_Q, stops_Q = batch.group_offsets_Q1[:-1], batch.group_offsets_Q1[1:]
    known_QM = batch.passage_hashes_P[Positives(starts_Q, batch.positive_counts).columns()[0]]
    if batch.known_positive_hashes_QM is not None:
        known_QM = torch.cat([known_QM, batch.known_positive_hashes_QM], dim=1)
    if mask_false_negatives and batch.query_hashes_Q is not None:
        known_QM = share_known_positives(known_QM, batch.query_hashes_Q, counts)
    return Negatives(
        positive_column_Q=starts_Q + first,
        group_stop_Q=stops_Q + first,
        passage_hash_P=hashes_P,
        known_positive_hash_QM=known_QM,
        in_batch_negatives=batch.in_batch_negatives,
        mask_false_negatives=mask_false_negatives,
        group_sizes=batch.group_sizes,
        positive_counts=batch.positive_counts,
    )


def share_known_positives(known_QM: Tensor, query_hash_Q: Tensor, counts: RankCounts | None) -> Tensor:
    """Known positives of this rank's queries, those of every row of the batch with the same query text
    added; the first column stays. Hashes of queries are on the host: only a question asked twice waits for
    the device.

    A question asked in two rows, once answered by page 1 and once by page 2, knows both pages in both rows:

        row 0  "how to print"  [1]            row 0  [1, 2]
        row 1  "how to save"   [5]     →      row 1  [5, 5]
        row 2  "how to print"  [2]            row 2  [2, 1]

    Rows outside the batch are not asked: their positives are seldom among its columns, and an index of all
    query texts would cost 16 bytes a row of the data.

    Args:
        counts: of all ranks, with their queries' hashes (collective); None: this rank's rows only.
    """
    hashes_R, known_RM = query_hash_Q, known_QM
    if counts is not None:
        assert counts.query_hashes is not None, "counted without the queries' hashes"
        hashes_R = counts.query_hashes
    # every rank compares the same hashes: either all of them go on to exchange known positives, or none
    if torch.unique(hashes_R).shape[0] == hashes_R.shape[0]:
        return known_QM
    if counts is not None:
        most = comm.max_over_ranks(int(known_QM.shape[1]))
        known_RM = gather_rows(widen(known_QM, most), counts.queries)
    shared: dict[int, dict[int, None]] = {}
    for query, known in zip(hashes_R.tolist(), known_RM.tolist()):
        shared.setdefault(query, {}).update(dict.fromkeys(known))
    rows = [
        list(dict.fromkeys([*own, *shared[query]]))
        for query, own in zip(query_hash_Q.tolist(), known_QM.tolist())
    ]
    widest = max((len(row) for row in rows), default=int(known_QM.shape[1]))
    padded = [row + row[:1] * (widest - len(row)) for row in rows]
    shape = (len(rows), widest)
    return torch.tensor(padded, dtype=torch.int64, device=known_QM.device).reshape(shape)


def widen(known_QM: Tensor, width: int) -> Tensor:
    """Rows padded to `width` by repeating the drawn positive, which changes no mask."""
    return torch.cat([known_QM, known_QM[:, :1].expand(-1, width - known_QM.shape[1])], dim=1)


def group_rows(values_P: Tensor, group_offsets_Q1: Tensor, group_sizes: Sequence[int], fill: float) -> Tensor:
    """Per-passage numbers of one rank (teacher scores) as values_QG, positive first; shorter groups end in
    `fill`. `group_sizes` are those of the offsets, on the host."""
    sizes_Q = group_offsets_Q1[1:] - group_offsets_Q1[:-1]
    place_G = torch.arange(max(group_sizes, default=0), device=values_P.device)
    index_QG = (group_offsets_Q1[:-1, None] + place_G).clamp(max=max(values_P.shape[0] - 1, 0))
    nothing = torch.full((), fill, dtype=values_P.dtype, device=values_P.device)
    return torch.where(place_G < sizes_Q[:, None], values_P[index_QG], nothing)
