"""Exact search over one corpus: the first stage by dense and by lexical scores, then all three scores of the
candidates.

Passages are scored in chunks, so that no [queries, corpus] matrix exists. With W ranks, rank r holds the
passages of rows r, r + W, r + 2W, …; hits are merged exactly, and each rank adds the scores of those
candidates that it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megam3.dist import comm
from megam3.retrieval.encode import EncodedTexts
from megam3.retrieval.topk import NO_ROW, Hits, empty_hits, merge_hits, merge_over_ranks
from megam3.scoring.lexical import lexical_scores

CHUNK_ELEMENTS = 1 << 24
"""Scores held at a time: 64 MB in fp32."""


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Passages to re-rank: dense hits first, in their order, then the lexical hits that are not among
    them."""

    rows_QK: Tensor
    """Row in the whole corpus, or NO_ROW."""
    num_dense: int
    """Columns that are dense hits."""
    also_lexical_QK: Tensor
    """bool: a dense hit that is a lexical hit, too."""
    dense_QK: Tensor
    lexical_QK: Tensor
    multi_vector_QK: Tensor
    """Scores; 0 where there is no passage."""


def dense_blocks(
    queries: EncodedTexts, passages: EncodedTexts, chunk_elements: int = CHUNK_ELEMENTS
) -> Iterator[tuple[int, Tensor]]:
    """(first passage, scores_QP) of consecutive runs of passages."""
    step = max(1, chunk_elements // max(queries.num_texts, 1))
    for first in range(0, passages.num_texts, step):
        yield first, queries.dense_ND @ passages.dense_ND[first : first + step].T


def lexical_blocks(
    queries: EncodedTexts, passages: EncodedTexts, chunk_elements: int = CHUNK_ELEMENTS
) -> Iterator[tuple[int, Tensor]]:
    """As `dense_blocks`, for lexical scores."""
    step = max(1, chunk_elements // max(queries.num_texts, 1))
    query_side = queries.lexical_weights_Z, queries.lexical_ids_Z, queries.lexical_offsets_N1
    for first in range(0, passages.num_texts, step):
        offsets = passages.lexical_offsets_N1[first : first + step + 1]
        pairs = slice(int(offsets[0]), int(offsets[-1]))
        yield (
            first,
            lexical_scores(
                *query_side,
                passages.lexical_weights_Z[pairs],
                passages.lexical_ids_Z[pairs],
                offsets - offsets[0],
            ),
        )


def global_rows(first: int, count: int) -> Tensor:
    """Rows in the whole corpus of this rank's passages first … first + count - 1."""
    return (torch.arange(count) + first) * comm.world_size() + comm.rank()


def best_of(
    blocks: Iterable[tuple[int, Tensor]], num_queries: int, num_hits: int, positive_only: bool = False
) -> Hits:
    """The best passages over all blocks and all ranks. `positive_only`: a score of 0 is no hit (no id in
    common)."""
    hits = empty_hits(num_queries)
    for first, scores_QP in blocks:
        if positive_only:
            scores_QP = scores_QP.masked_fill(scores_QP <= 0, -torch.inf)
        rows = global_rows(first, scores_QP.shape[1]).expand(num_queries, -1)
        hits = merge_hits(hits, Hits(scores_QP, rows), num_hits)
    return merge_over_ranks(hits, num_hits)


def _pick(blocks: Iterable[tuple[int, Tensor]], rows_QK: Tensor) -> Tensor:
    """Scores of the candidates that this rank holds, 0 elsewhere."""
    picked_QK = torch.zeros(rows_QK.shape)
    local_QK = (rows_QK - comm.rank()) // comm.world_size()
    mine_QK = (rows_QK != NO_ROW) & (rows_QK % comm.world_size() == comm.rank())
    for first, scores_QP in blocks:
        query, column = (mine_QK & (local_QK >= first) & (local_QK < first + scores_QP.shape[1])).nonzero(
            as_tuple=True
        )
        picked_QK[query, column] = scores_QP[query, local_QK[query, column] - first]
    return picked_QK


def unite(dense: Hits, lexical: Hits) -> tuple[Tensor, Tensor]:
    """rows_QK of the dense hits and then the lexical hits (NO_ROW where a dense hit is named again), and
    which dense hits are both."""
    rows_QK = torch.cat([dense.rows_QK, lexical.rows_QK], dim=1)
    ordered, order = rows_QK.sort(dim=1, stable=True)
    again = torch.zeros_like(ordered, dtype=torch.bool)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_ROW)
    before = torch.zeros_like(again)
    before[:, :-1] = again[:, 1:]
    both_QK = torch.zeros_like(again).scatter_(1, order, before)
    return rows_QK.masked_fill(torch.zeros_like(again).scatter_(1, order, again), NO_ROW), both_QK


def local_candidates(rows_QK: Tensor) -> dict[int, list[tuple[int, int]]]:
    """passage of this rank -> (query, column) pairs that ask for it."""
    wanted: dict[int, list[tuple[int, int]]] = {}
    places = ((rows_QK != NO_ROW) & (rows_QK % comm.world_size() == comm.rank())).nonzero()
    local = (rows_QK[places[:, 0], places[:, 1]] - comm.rank()) // comm.world_size()
    for passage, (query, column) in zip(local.tolist(), places.tolist()):
        wanted.setdefault(passage, []).append((query, column))
    return wanted


def maxsim_of(
    query_rows: Sequence[Tensor], passage_rows_LC: Tensor, chunk_elements: int = CHUNK_ELEMENTS
) -> Tensor:
    """Mean over each query's rows of the best product with a passage row, [number of queries]; 0 for a text
    without rows."""
    scores = torch.zeros(len(query_rows))
    if passage_rows_LC.shape[0] == 0:
        return scores
    step = max(1, chunk_elements // (passage_rows_LC.shape[0] * max(max(map(len, query_rows)), 1)))
    for first in range(0, len(query_rows), step):
        part = query_rows[first : first + step]
        best_K = (torch.cat(list(part)).float() @ passage_rows_LC.T).amax(dim=1)
        counts = torch.tensor([len(rows) for rows in part])
        query_K = torch.repeat_interleave(torch.arange(len(part)), counts)
        scores[first : first + step] = torch.zeros(len(part)).index_add_(0, query_K, best_K) / counts.clamp(
            min=1
        )
    return scores


def score_candidates(
    queries: EncodedTexts,
    passages: EncodedTexts,
    dense: Hits,
    multi_rows: Iterable[tuple[int, Tensor]] | None,
    wanted: dict[int, list[tuple[int, int]]],
    united: tuple[Tensor, Tensor],
) -> Candidates:
    """All three scores of the united candidates; `multi_rows` None leaves the multi-vector scores at 0."""
    rows_QK, both_QK = united
    multi_QK = torch.zeros(rows_QK.shape)
    query_rows = queries.multi_rows
    assert query_rows is not None, "queries' rows are always kept"
    for passage, rows_LC in multi_rows or ():
        asking = wanted[passage]
        places = torch.tensor(asking)
        multi_QK[places[:, 0], places[:, 1]] = maxsim_of([query_rows[query] for query, _ in asking], rows_LC)
    scores = [
        _pick(dense_blocks(queries, passages), rows_QK),
        _pick(lexical_blocks(queries, passages), rows_QK),
        multi_QK,
    ]
    dense_QK, lexical_QK, multi_QK = (comm.all_reduce_sum(score) for score in scores)
    return Candidates(
        rows_QK=rows_QK,
        num_dense=dense.rows_QK.shape[1],
        also_lexical_QK=both_QK,
        dense_QK=dense_QK,
        lexical_QK=lexical_QK,
        multi_vector_QK=multi_QK,
    )
