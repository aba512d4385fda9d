"""Candidates of many queries from an index, found by dense or lexical scores, ranked by a head or their sum.

dense, lexical     the best of all passages
multi_vector       the best `depth` by dense, ranked by multi-vector scores
sum                the best `depth` by dense and by lexical, ranked by
                   w_dense·dense + w_lexical·lexical + w_multi·multi_vector
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse
import torch

from megam3.config.weights import HeadWeights
from megam3.retrieval.index.layout import PassageIndex, Postings
from megam3.retrieval.index.nearest import DenseSearch, dense_hits
from megam3.retrieval.index.vectors import TextVectors
from megam3.retrieval.search import unite
from megam3.retrieval.topk import NO_ROW, Hits, empty_hits, merge_hits, sort_by_score
from megam3.scoring.maxsim import maxsim_scores

RankBy = Literal["dense", "lexical", "multi_vector", "sum"]
GATHERED_BYTES = 256 << 20
"""Representations of candidates held at a time, or of one query's candidates when these take more."""
PRODUCT_ENTRIES = 1 << 24
"""Scores that a product of postings may hold at a time: 12 bytes each, where every passage shares an id."""
PostingValue = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(passages in the shard, stored weights) of some postings -> what each is worth, float32."""
RANK_BY = ("dense", "lexical", "multi_vector", "sum")


def as_float(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The stored weight."""
    return weights.astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How candidates are found and ranked."""

    by: RankBy = "dense"
    depth: int = 210
    """Candidates of each query."""
    weights: HeadWeights = HeadWeights(dense=1.0, lexical=0.3, multi_vector=1.0)
    """Of the sum: the paper's inference weights (arXiv 2402.03216, section 4.1)."""
    dense_search: DenseSearch = "faiss"
    device: str = "cpu"
    """Where `torch` searches and MaxSim runs."""

    @property
    def needed_heads(self) -> tuple[str, ...]:
        """The heads whose scores find or rank candidates."""
        if self.by != "sum":
            return ("dense", "multi_vector") if self.by == "multi_vector" else (self.by,)
        # candidates come from these two, whatever they weigh
        return ("dense", "lexical", *(["multi_vector"] if self.weights.multi_vector > 0 else []))

    @property
    def needs_lexical(self) -> bool:
        """Whether the index must hold lexical weights."""
        return "lexical" in self.needed_heads

    @property
    def needs_multi_vector(self) -> bool:
        """Whether the index must hold multi-vector rows."""
        return "multi_vector" in self.needed_heads


def find_candidates(index: PassageIndex, queries: TextVectors, options: SearchOptions) -> Hits:
    """The best passages of each query, by the score that `options.by` names, best first."""
    assert index.spec.lexical or not options.needs_lexical, "the index keeps no lexical weights"
    if options.by == "lexical":
        return lexical_hits(index, queries, options.depth)
    dense = dense_hits(index, queries.dense_ND, options.depth, options.dense_search, options.device)
    if options.by == "dense":
        return dense
    if options.by == "multi_vector":
        return rank_again(index, queries, dense.rows_QK.numpy(), options)
    rows_QK, _ = unite(dense, lexical_hits(index, queries, options.depth))
    return rank_again(index, queries, rows_QK.numpy(), options)


def rank_again(
    index: PassageIndex, queries: TextVectors, rows_QK: np.ndarray, options: SearchOptions
) -> Hits:
    """The best `depth` of each query's candidates by `options.by`; NO_ROW among them stands for none."""
    scores_QK = np.full(rows_QK.shape, -np.inf, dtype=np.float32)
    # one reading of every shard for several queries: their candidates lie all over the index
    step = max(1, GATHERED_BYTES // max(rows_QK.shape[1] * index.bytes_per_passage(), 1))
    for first in range(0, len(rows_QK), step):
        part = rows_QK[first : first + step]
        wanted = np.unique(part[part != NO_ROW])
        if not len(wanted):
            continue
        passages = index.gather(wanted)
        for query, rows in enumerate(part, first):
            columns = np.flatnonzero(rows != NO_ROW)
            own = passages.select(np.searchsorted(wanted, rows[columns]).tolist())
            scores_QK[query, columns] = score_passages(queries, query, own, options)
    return sort_by_score(torch.from_numpy(scores_QK), torch.from_numpy(rows_QK), options.depth)


def score_passages(
    queries: TextVectors, query: int, passages: TextVectors, options: SearchOptions
) -> np.ndarray:
    """Scores of one query with each of some passages, float32 [n], by `options.by`."""
    by, weights = options.by, options.weights
    scores = np.zeros(passages.num_texts, dtype=np.float32)
    if by in ("dense", "sum"):
        weight = weights.dense if by == "sum" else 1.0
        scores += weight * (passages.dense_ND.astype(np.float32) @ queries.dense_ND[query].astype(np.float32))
    if by in ("lexical", "sum"):
        scores += (weights.lexical if by == "sum" else 1.0) * lexical_products(
            queries.lexical(query), passages
        )
    if options.needs_multi_vector:
        weight = weights.multi_vector if by == "sum" else 1.0
        scores += weight * maxsim_of_passages(queries.multi(query), passages, options.device)
    return scores


def lexical_products(query: tuple[np.ndarray, np.ndarray], passages: TextVectors) -> np.ndarray:
    """Lexical scores, float32 [n], of one query's (ids, weights) with each passage."""
    ids, weights = query
    if not len(ids):
        return np.zeros(passages.num_texts, dtype=np.float32)
    place_Z = np.searchsorted(ids, passages.lexical_ids_Z).clip(max=len(ids) - 1)
    products_Z = np.where(
        ids[place_Z] == passages.lexical_ids_Z,
        weights[place_Z] * passages.lexical_weights_Z.astype(np.float32),
        0,
    )
    text_Z = np.repeat(np.arange(passages.num_texts), np.diff(passages.lexical_offsets_N1))
    return np.bincount(text_Z, products_Z, minlength=passages.num_texts).astype(np.float32)


def maxsim_of_passages(query_KC: np.ndarray, passages: TextVectors, device: str) -> np.ndarray:
    """Multi-vector scores, float32 [n], of one query's rows with each passage."""
    assert passages.multi_KC is not None, "the index keeps no multi-vector rows"
    assert passages.multi_offsets_N1 is not None
    query = torch.from_numpy(np.array(query_KC)).to(device).float()
    rows = torch.from_numpy(passages.multi_KC).to(device).float()
    # offsets where the rows are, and the counts here: they are known, and asking a device for them would wait
    scores = maxsim_scores(
        query,
        torch.tensor([0, query.shape[0]], device=device),
        rows,
        torch.from_numpy(passages.multi_offsets_N1).to(device),
        query_counts=[query.shape[0]],
        passage_counts=np.diff(passages.multi_offsets_N1).tolist(),
    )
    return scores.cpu().numpy()[0]


def lexical_hits(index: PassageIndex, queries: TextVectors, num_hits: int) -> Hits:
    """The best passages of each query by lexical score; a passage without an id in common is no hit."""
    hits = empty_hits(queries.num_texts)
    for number in range(index.spec.num_shards):
        shard = index.shard(number)
        found = posting_hits(shard.postings, len(shard.vectors.dense_ND), queries, num_hits)
        hits = merge_hits(hits, shifted(found, shard.first_row), num_hits)
    return hits


def shifted(hits: Hits, first_row: int) -> Hits:
    """Hits of one shard with rows of the whole index."""
    return Hits(hits.scores_QK, torch.where(hits.rows_QK == NO_ROW, NO_ROW, hits.rows_QK + first_row))


def posting_hits(
    postings: Postings, num_passages: int, queries: TextVectors, num_hits: int, value: PostingValue = as_float
) -> Hits:
    """The best of a shard by the sum, over the ids that a query holds, of its weight times the `value` of the
    posting.

    Term at a time over the postings of the queries' ids alone: a product of two sparse matrices, [Q, U] and
    [U, n], over as many queries at a time as PRODUCT_ENTRIES allows.
    """
    ids = queries.lexical_ids_Z
    place_Z = np.searchsorted(postings.terms_U, ids).clip(max=max(len(postings.terms_U) - 1, 0))
    known_Z = postings.terms_U[place_Z] == ids if len(postings.terms_U) else np.zeros(len(ids), dtype=bool)
    used_U, column_z = np.unique(place_Z[known_Z], return_inverse=True)
    query_z = np.repeat(np.arange(queries.num_texts), np.diff(queries.lexical_offsets_N1))[known_Z]
    weights_z = queries.lexical_weights_Z[known_Z].astype(np.float32)
    left = scipy.sparse.csr_array((weights_z, (query_z, column_z)), shape=(queries.num_texts, len(used_U)))
    starts, stops = postings.offsets_U1[used_U], postings.offsets_U1[used_U + 1]
    counts = stops - starts
    # places of all postings of the used ids, one run after another
    offsets = np.concatenate([[0], np.cumsum(counts)])
    place = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], counts)
    rows = postings.rows_Z[place]
    values = value(rows, postings.weights_Z[place])
    right = scipy.sparse.csr_array((values, rows, offsets), shape=(len(used_U), num_passages))
    step = max(1, PRODUCT_ENTRIES // max(num_passages, 1))
    parts = [
        _best_of_rows(left[first : first + step] @ right, min(num_hits, num_passages))
        for first in range(0, max(queries.num_texts, 1), step)
    ]
    return Hits(torch.cat([part.scores_QK for part in parts]), torch.cat([part.rows_QK for part in parts]))


def _best_of_rows(product: scipy.sparse.csr_array, num_hits: int) -> Hits:
    num_queries = product.shape[0]
    scores = np.full((num_queries, num_hits), -np.inf, dtype=np.float32)
    rows = np.full((num_queries, num_hits), NO_ROW, dtype=np.int64)
    for query in range(num_queries):
        entries = slice(product.indptr[query], product.indptr[query + 1])
        values, columns = product.data[entries], product.indices[entries]
        if len(values) > num_hits:
            # a partition alone takes any of the equal scores at the edge: above it all, of equal ones the
            # first rows, as `top_k` does
            edge = np.partition(values, -num_hits)[-num_hits]
            above, equal = np.flatnonzero(values > edge), np.flatnonzero(values == edge)
            equal = equal[np.argsort(columns[equal])][: num_hits - len(above)]
            kept = np.concatenate([above, equal])
            values, columns = values[kept], columns[kept]
        scores[query, : len(values)], rows[query, : len(values)] = values, columns
    return Hits(torch.from_numpy(scores), torch.from_numpy(rows))
