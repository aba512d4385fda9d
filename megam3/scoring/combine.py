"""Scores of all heads and of their weighted sum: for texts of one rank, and for own queries against every
rank's passages.

Over ranks nothing that grows with the number of passage tokens of other ranks is ever held:
    dense         every rank's passage vectors come here (D numbers per passage), then one product
    multi-vector  every rank's QUERIES come here, meet the own passages, and the score columns travel back
    lexical       the same with the queries' (id, weight) pairs
Counts travel in two rounds for all of it; a single rank sends nothing. Gradients follow the convention of
`megam3.dist.gather`.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from megam3.batch import Representations
from megam3.config.weights import HEADS, HeadWeights
from megam3.dist import comm
from megam3.dist.gather import exchange_columns, gather_rows
from megam3.scoring.dense import dense_scores
from megam3.scoring.lexical import lexical_scores
from megam3.scoring.maxsim import maxsim_scores


@dataclass(frozen=True, kw_only=True)
class Scores:
    """One matrix per head that was asked for, before any temperature; columns are passages."""

    dense_QP: Tensor | None = None
    lexical_QP: Tensor | None = None
    multi_vector_QP: Tensor | None = None
    sum_QP: Tensor | None = None
    """Weighted sum of the heads; None when no weights were given."""

    def by_name(self) -> dict[str, Tensor]:
        """The matrices that exist, keyed dense, lexical, multi_vector, sum."""
        named = {
            "dense": self.dense_QP,
            "lexical": self.lexical_QP,
            "multi_vector": self.multi_vector_QP,
            "sum": self.sum_QP,
        }
        return {name: scores for name, scores in named.items() if scores is not None}


def _lexical(queries: Representations, passages: Representations) -> Tensor:
    return lexical_scores(
        queries.lexical_weights_Z,
        queries.lexical_ids_Z,
        queries.lexical_offsets_N1,
        passages.lexical_weights_Z,
        passages.lexical_ids_Z,
        passages.lexical_offsets_N1,
        query_counts=queries.pair_counts,
    )


def _multi(queries: Representations, passages: Representations, maxsim: Literal["mean", "sum"]) -> Tensor:
    return maxsim_scores(
        queries.multi_KC,
        queries.multi_offsets_N1,
        passages.multi_KC,
        passages.multi_offsets_N1,
        maxsim,
        query_counts=queries.row_counts,
        passage_counts=passages.row_counts,
    )


def _with_sum(heads: dict[str, Tensor], weights: HeadWeights | None) -> Scores:
    total: Tensor | None = None
    if weights is not None:
        missing = [name for name in HEADS if getattr(weights, name) and name not in heads]
        assert not missing, f"the sum gives weight to heads that were not scored: {missing}"
        parts = [getattr(weights, name) * scores for name, scores in heads.items() if getattr(weights, name)]
        total = torch.stack(parts).sum(0) if parts else torch.zeros_like(next(iter(heads.values())))
    return Scores(
        dense_QP=heads.get("dense"),
        lexical_QP=heads.get("lexical"),
        multi_vector_QP=heads.get("multi_vector"),
        sum_QP=total,
    )


def score_heads(
    queries: Representations,
    passages: Representations,
    weights: HeadWeights | None,
    maxsim: Literal["mean", "sum"] = "mean",
    heads: Collection[str] = HEADS,
) -> Scores:
    """Scores of these queries with these passages; no rank is asked.

    Args:
        weights: of the heads in the sum; None leaves the sum out.
        maxsim: reduction of the multi-vector score over query rows.
        heads: which heads to score.
    """
    scored: dict[str, Tensor] = {}
    if "dense" in heads:
        scored["dense"] = dense_scores(queries.dense_ND, passages.dense_ND)
    if "lexical" in heads:
        scored["lexical"] = _lexical(queries, passages)
    if "multi_vector" in heads:
        scored["multi_vector"] = _multi(queries, passages, maxsim)
    return _with_sum(scored, weights)


@dataclass(frozen=True, kw_only=True)
class RankCounts:
    """What every rank holds, on the host: all that a step has to know of other ranks before it exchanges."""

    queries: tuple[int, ...]
    """Per rank."""
    passages: tuple[int, ...]
    """Per rank."""
    pairs_by_query: tuple[int, ...]
    """Lexical pairs of each query of all ranks, in rank order."""
    rows_by_query: tuple[int, ...]
    """Multi-vector rows of each, likewise."""
    query_hashes: Tensor | None = None
    """int64 [queries of all ranks]: hashes of their texts, where `count_over_ranks` was given this rank's."""

    @property
    def row_scale(self) -> float:
        """W / queries of all ranks: makes the mean over ranks of local sums the mean over all queries."""
        return comm.world_size() / sum(self.queries)

    @property
    def first_passage(self) -> int:
        """Column of this rank's first passage among all ranks' passages."""
        return sum(self.passages[: comm.rank()])

    def per_rank(self, by_query: tuple[int, ...]) -> tuple[int, ...]:
        """Sums over each rank's queries."""
        edges = [0, *accumulate(self.queries)]
        return tuple(sum(by_query[start:stop]) for start, stop in zip(edges, edges[1:]))


def count_over_ranks(
    queries: Representations, passages: Representations, query_hashes_Q: Tensor | None = None
) -> RankCounts:
    """Two rounds of integers, and a wait of the host for each; every later transfer of a step is sized by
    them.

    Args:
        query_hashes_Q: int64, on the host: travel along, for whoever compares the questions of all ranks.
    """
    sizes = comm.all_gather_ints([queries.num_texts, passages.num_texts])
    queries_W, passages_W = (tuple(column) for column in zip(*sizes))
    own = torch.tensor([queries.pair_counts, queries.row_counts], dtype=torch.int64).T
    if query_hashes_Q is not None:
        own = torch.cat([own, query_hashes_Q[:, None]], dim=1)
    columns = gather_rows(own, queries_W).unbind(1)
    pairs_R, rows_R = (tuple(column.tolist()) for column in columns[:2])
    return RankCounts(
        queries=queries_W,
        passages=passages_W,
        pairs_by_query=pairs_R,
        rows_by_query=rows_R,
        query_hashes=columns[2] if query_hashes_Q is not None else None,
    )


def _offsets(counts: tuple[int, ...], device: torch.device) -> Tensor:
    return comm.copy_pinned(torch.tensor([0, *accumulate(counts)], dtype=torch.int64), device)


def gather_queries(queries: Representations, counts: RankCounts, heads: Collection[str]) -> Representations:
    """Every rank's queries, in rank order, for the heads named; the other heads keep this rank's tensors."""
    changes: dict[str, Any] = {}
    if "dense" in heads:
        changes["dense_ND"] = gather_rows(queries.dense_ND, counts.queries)
    device = queries.dense_ND.device
    if "lexical" in heads:
        pairs_W = counts.per_rank(counts.pairs_by_query)
        changes |= {
            "lexical_weights_Z": gather_rows(queries.lexical_weights_Z, pairs_W),
            "lexical_ids_Z": gather_rows(queries.lexical_ids_Z, pairs_W),
            "lexical_offsets_N1": _offsets(counts.pairs_by_query, device),
            "pair_counts": counts.pairs_by_query,
        }
    if "multi_vector" in heads:
        changes |= {
            "multi_KC": gather_rows(queries.multi_KC, counts.per_rank(counts.rows_by_query)),
            "multi_offsets_N1": _offsets(counts.rows_by_query, device),
            "row_counts": counts.rows_by_query,
        }
    return replace(queries, **changes)


def score_global(
    queries: Representations,
    passages: Representations,
    weights: HeadWeights | None,
    maxsim: Literal["mean", "sum"] = "mean",
    heads: Collection[str] = HEADS,
    counts: RankCounts | None = None,
) -> Scores:
    """Scores of this rank's queries with the passages of every rank, columns in rank order; exact gradients
    to every rank.

    Args: as `score_heads`; `counts` from `count_over_ranks` where the caller has it already. All ranks must
    call with the same heads.
    """
    if not comm.is_grouped():
        return score_heads(queries, passages, weights, maxsim, heads)
    counts = counts or count_over_ranks(queries, passages)
    scored: dict[str, Tensor] = {}
    if "dense" in heads:
        scored["dense"] = dense_scores(queries.dense_ND, gather_rows(passages.dense_ND, counts.passages))
    travelling = [name for name in HEADS[1:] if name in heads]
    if travelling:
        of_all_ranks = gather_queries(queries, counts, travelling)
        blocks = [
            _lexical(of_all_ranks, passages) if name == "lexical" else _multi(of_all_ranks, passages, maxsim)
            for name in travelling
        ]
        scored.update(zip(travelling, exchange_columns(torch.stack(blocks), counts.queries, counts.passages)))
    return _with_sum(scored, weights)
