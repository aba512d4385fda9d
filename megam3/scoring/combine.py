"""Scores of all heads and of their weighted sum: for texts of one rank, and for own queries against every
rank's passages.

Over ranks nothing that grows with the number of passage tokens of other ranks is ever held:
    dense         every rank's passage vectors come here (D numbers per passage), then one product
    multi-vector  every rank's QUERIES come here, meet the own passages, and the score columns travel back
    lexical       the same with the queries' (id, weight) pairs
Counts travel in one round for all of it; a single rank sends nothing. Gradients follow `megam3.dist.gather`'s
convention.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from megam3.batch import Representations
from megam3.config.objective import HEADS, HeadWeights
from megam3.dist import comm
from megam3.dist.gather import exchange_columns, gather_offsets, gather_rows
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
    )


def _multi(queries: Representations, passages: Representations, maxsim: Literal["mean", "sum"]) -> Tensor:
    return maxsim_scores(
        queries.multi_KC, queries.multi_offsets_N1, passages.multi_KC, passages.multi_offsets_N1, maxsim
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
    """Per rank: queries, passages, the queries' lexical pairs and multi-vector rows."""

    queries: tuple[int, ...]
    passages: tuple[int, ...]
    query_pairs: tuple[int, ...]
    query_rows: tuple[int, ...]

    @property
    def row_scale(self) -> float:
        """W / queries of all ranks: makes the mean over ranks of local sums the mean over all queries."""
        return comm.world_size() / sum(self.queries)

    @property
    def first_passage(self) -> int:
        """Column of this rank's first passage among all ranks' passages."""
        return sum(self.passages[: comm.rank()])


def count_over_ranks(queries: Representations, passages: Representations) -> RankCounts:
    """One round of integers; every later transfer of a step is sized by it."""
    own = [queries.num_texts, passages.num_texts, queries.lexical_ids_Z.shape[0], queries.multi_KC.shape[0]]
    queries_W, passages_W, pairs_W, rows_W = (tuple(column) for column in zip(*comm.all_gather_ints(own)))
    return RankCounts(queries=queries_W, passages=passages_W, query_pairs=pairs_W, query_rows=rows_W)


def gather_queries(queries: Representations, counts: RankCounts, heads: Collection[str]) -> Representations:
    """Every rank's queries, in rank order, for the heads named; the other heads keep this rank's tensors."""
    replaced = queries
    if "dense" in heads:
        replaced = replace(replaced, dense_ND=gather_rows(queries.dense_ND, counts.queries))
    if "lexical" in heads:
        weights = gather_rows(queries.lexical_weights_Z, counts.query_pairs)
        ids, offsets = (
            gather_rows(queries.lexical_ids_Z, counts.query_pairs),
            gather_offsets(queries.lexical_offsets_N1, counts.queries),
        )
        replaced = replace(replaced, lexical_weights_Z=weights, lexical_ids_Z=ids, lexical_offsets_N1=offsets)
    if "multi_vector" in heads:
        rows, offsets = (
            gather_rows(queries.multi_KC, counts.query_rows),
            gather_offsets(queries.multi_offsets_N1, counts.queries),
        )
        replaced = replace(replaced, multi_KC=rows, multi_offsets_N1=offsets)
    return replaced


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
