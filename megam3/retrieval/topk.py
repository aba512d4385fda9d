"""The k best of many scores, with ties broken by row, so that chunks and ranks merge into exactly what one
pass would find."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megam3.dist import comm

NO_ROW = -1
"""Row of a place that holds no passage; its score is -inf."""


@dataclass(frozen=True)
class Hits:
    """Best passages of each query: scores descend, equal scores by ascending row."""

    scores_QK: Tensor
    rows_QK: Tensor
    """int64: row of the passage in the whole corpus, or NO_ROW."""

    def first(self, num_hits: int) -> Hits:
        """The best `num_hits` of each query."""
        return Hits(self.scores_QK[:, :num_hits], self.rows_QK[:, :num_hits])


def top_k(scores_QX: Tensor, rows_QX: Tensor, num_hits: int) -> Hits:
    """The best `num_hits` (or all, when there are fewer) of each row of scores.

    Columns with equal scores must stand in ascending order of their rows. Scores of -inf are no hits.
    """
    num_hits = min(num_hits, scores_QX.shape[1])
    if num_hits < scores_QX.shape[1]:
        # topk alone takes any of the equal scores at the edge: take those above the edge, then the first that
        # equal it
        edge_Q1 = scores_QX.topk(num_hits, dim=1).values[:, -1:]
        above, equal = scores_QX > edge_Q1, scores_QX == edge_Q1
        room_Q1 = num_hits - above.sum(1, keepdim=True)
        chosen = above | (equal & (equal.cumsum(1) <= room_Q1))
        columns = chosen.nonzero()[:, 1].view(-1, num_hits)
        scores_QX, rows_QX = scores_QX.gather(1, columns), rows_QX.gather(1, columns)
    scores, order = scores_QX.sort(dim=1, descending=True, stable=True)
    rows = rows_QX.gather(1, order)
    return Hits(scores, rows.masked_fill(scores == -torch.inf, NO_ROW))


def sort_by_score(scores_QX: Tensor, rows_QX: Tensor, num_hits: int) -> Hits:
    """As `top_k`, for columns in any order."""
    rows, order = rows_QX.sort(dim=1)
    return top_k(scores_QX.gather(1, order), rows, num_hits)


def empty_hits(num_queries: int) -> Hits:
    """No hits yet."""
    return Hits(torch.zeros(num_queries, 0), torch.zeros(num_queries, 0, dtype=torch.int64))


def merge_hits(first: Hits, second: Hits, num_hits: int) -> Hits:
    """The best of both."""
    scores, rows = (
        torch.cat([first.scores_QK, second.scores_QK], 1),
        torch.cat([first.rows_QK, second.rows_QK], 1),
    )
    return sort_by_score(scores, rows, num_hits)


def merge_over_ranks(hits: Hits, num_hits: int) -> Hits:
    """The best over all ranks, on every rank."""
    if comm.world_size() == 1:
        return hits
    num_queries, width = hits.scores_QK.shape
    width = comm.max_over_ranks(width)
    scores = torch.full((comm.world_size(), num_queries, width), 0.0)
    rows = torch.zeros(comm.world_size(), num_queries, width, dtype=torch.int64)
    # every rank fills its own slice of zeros, so the sum is a gather; -inf + 0 stays -inf
    mine = comm.rank()
    scores[mine], rows[mine] = -torch.inf, NO_ROW
    scores[mine, :, : hits.scores_QK.shape[1]] = hits.scores_QK
    rows[mine, :, : hits.rows_QK.shape[1]] = hits.rows_QK
    scores, rows = comm.all_reduce_sum(scores), comm.all_reduce_sum(rows)
    return sort_by_score(scores.transpose(0, 1).flatten(1), rows.transpose(0, 1).flatten(1), num_hits)
