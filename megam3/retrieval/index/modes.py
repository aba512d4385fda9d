"""The paper's five modes (arXiv 2402.03216, section 4.1) over an index on disk, with bounded memory.

    first stage   dense_hits and lexical_hits, shard by shard
    candidates    united; their rows ascend, so that each shard is read once, in slices of GATHERED_BYTES
    ranking       rank_candidates, the same function that ranks a corpus held in memory

An index without multi-vector rows is served as well: the candidates' texts are encoded again. A row takes
2·C bytes a token, 2 kB for a width of 1024, so that a million passages of 100 tokens would need 200 GB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megam3.config.schema import MODE_HEADS, EvaluationConfig
from megam3.embedder import M3Embedder
from megam3.retrieval.evaluate import SEARCHED, rank_candidates
from megam3.retrieval.index.documents import Documents
from megam3.retrieval.index.layout import PassageIndex
from megam3.retrieval.index.nearest import DenseSearch, dense_hits
from megam3.retrieval.index.pool import TextPool
from megam3.retrieval.index.search import GATHERED_BYTES, lexical_hits, lexical_products, maxsim_of_passages
from megam3.retrieval.index.vectors import TextVectors, encode_vectors
from megam3.retrieval.search import Candidates, unite
from megam3.retrieval.topk import NO_ROW, Hits, empty_hits

FIVE_MODES: tuple[str, ...] = tuple(MODE_HEADS)


@dataclass(frozen=True, kw_only=True)
class EncodeRows:
    """Passages of a pool, by row, encoded again when their multi-vector rows are asked for."""

    encode: Callable[[Sequence[int]], TextVectors]
    tokens_at_most: Callable[[np.ndarray], np.ndarray]
    """Of each row; decides how many are held at a time."""


@dataclass(frozen=True, kw_only=True)
class ModeOptions:
    """How the five modes search."""

    config: EvaluationConfig
    """Weights of the sum, and how many candidates are ranked again."""
    modes: Sequence[str] = FIVE_MODES
    dense_search: DenseSearch = "faiss"
    device: str = "cpu"
    """Where `torch` searches and MaxSim runs."""


def rows_encoder(
    embedder: M3Embedder, pool: TextPool, index: PassageIndex, batch_tokens: int | None = None
) -> EncodeRows:
    """Encodes rows of the pool as the index did, and keeps their multi-vector rows in memory."""

    def encode(rows: Sequence[int]) -> TextVectors:
        return encode_vectors(
            embedder,
            [index.spec.instruction + pool.text(row) for row in rows],
            max_tokens=index.spec.max_tokens,
            lexical=False,
            batch_tokens=batch_tokens,
            new_multi=lambda shape: np.empty(shape, dtype=np.float16),
        )

    def tokens_at_most(rows: np.ndarray) -> np.ndarray:
        # a token is at least a byte, but for the special ones and the mark of a word's beginning
        own = pool.starts[rows + 1] - pool.starts[rows] + len(index.spec.instruction.encode()) + 3
        return np.minimum(own, index.spec.max_tokens)

    return EncodeRows(encode=encode, tokens_at_most=tokens_at_most)


def search_modes(
    index: PassageIndex,
    queries: TextVectors,
    options: ModeOptions,
    encode_rows: EncodeRows,
    documents: Documents | None = None,
) -> dict[str, Hits]:
    """Rankings of the modes asked for; `encode_rows` is called for an index without multi-vector rows.

    Args:
        documents: rank documents, of which several may have one text; None: rows of the pool.

    Memory: one shard's vectors, GATHERED_BYTES of candidates, and three scores of 4 bytes for each candidate
    of each query.
    """
    config = options.config
    depth = max(config.rerank_dense, config.rerank_hybrid, SEARCHED)
    dense = dense_hits(index, queries.dense_ND, depth, options.dense_search, options.device)
    if index.spec.lexical:
        lexical = lexical_hits(index, queries, max(config.rerank_hybrid, SEARCHED))
    else:
        lexical = empty_hits(queries.num_texts)
    if documents is not None:
        dense = documents.expand(dense, depth)
        lexical = documents.expand(lexical, max(config.rerank_hybrid, SEARCHED))
    hits = {"Dense": dense, "Sparse": lexical}
    if set(options.modes) - set(hits):
        first = dense.first(max(config.rerank_dense, config.rerank_hybrid))
        united = _United(first, lexical.first(config.rerank_hybrid), documents)
        hits |= rank_candidates(_candidates(index, queries, united, options, encode_rows), config)
    return {mode: hits[mode] for mode in FIVE_MODES if mode in options.modes}


class _United:
    """Candidates of each query, as rows that are ranked and as the rows of the index they are found at."""

    def __init__(self, dense: Hits, lexical: Hits, documents: Documents | None):
        self.rows_QK, self.also_lexical_QK = unite(dense, lexical)
        self.num_dense = dense.rows_QK.shape[1]
        rows_QK = self.rows_QK.numpy()
        self.index_rows_QK = (
            rows_QK
            if documents is None
            else np.where(rows_QK == NO_ROW, NO_ROW, documents.pool_rows[rows_QK])
        )


def _candidates(
    index: PassageIndex,
    queries: TextVectors,
    united: _United,
    options: ModeOptions,
    encode_rows: EncodeRows,
) -> Candidates:
    """All three scores of the united dense and lexical hits."""
    rows_QK = united.index_rows_QK
    dense_QK, lexical_QK, multi_QK = (np.zeros(rows_QK.shape, dtype=np.float32) for _ in range(3))
    with_multi = bool({"Multi-vec", "All"}.intersection(options.modes))
    for passages, askers in _slices(index, rows_QK, encode_rows if with_multi else None):
        for query, columns, places in askers:
            own = passages.select(places)
            dense_QK[query, columns] = own.dense_ND.astype(np.float32) @ queries.dense_ND[query]
            lexical_QK[query, columns] = lexical_products(queries.lexical(query), own)
            if with_multi:
                multi_QK[query, columns] = maxsim_of_passages(queries.multi(query), own, options.device)
    return Candidates(
        rows_QK=united.rows_QK,
        num_dense=united.num_dense,
        also_lexical_QK=united.also_lexical_QK,
        dense_QK=torch.from_numpy(dense_QK),
        lexical_QK=torch.from_numpy(lexical_QK),
        multi_vector_QK=torch.from_numpy(multi_QK),
    )


_Askers = list[tuple[int, np.ndarray, list[int]]]
"""(query, its columns, their places in the slice)."""


def _slices(
    index: PassageIndex, rows_QK: np.ndarray, encode_rows: EncodeRows | None
) -> Iterator[tuple[TextVectors, _Askers]]:
    """Runs of candidates, read or encoded once each, and the queries that ask for them."""
    wanted = np.unique(rows_QK[rows_QK != NO_ROW])
    sizes = np.full(len(wanted), index.bytes_per_passage(), dtype=np.int64)
    if encode_rows is not None and not index.spec.multi_vector and len(wanted):
        # rows that are encoded again are not in bytes_per_passage; at most as wide as the dense vector
        sizes += 2 * index.shard(0).vectors.dense_ND.shape[1] * encode_rows.tokens_at_most(wanted)
    for part in _parts(wanted, sizes):
        passages = index.gather(part)
        if encode_rows is not None and passages.multi_KC is None:
            again = encode_rows.encode(part.tolist())
            passages = replace(passages, multi_KC=again.multi_KC, multi_offsets_N1=again.multi_offsets_N1)
        query_A, column_A = np.nonzero((rows_QK >= part[0]) & (rows_QK <= part[-1]))
        place_A = np.searchsorted(part, rows_QK[query_A, column_A])
        ends = np.flatnonzero(np.diff(query_A)) + 1  # np.nonzero goes query by query
        groups = zip(np.split(query_A, ends), np.split(column_A, ends), np.split(place_A, ends))
        yield passages, [(int(q[0]), columns, places.tolist()) for q, columns, places in groups if len(q)]


def _parts(rows: np.ndarray, sizes: np.ndarray) -> list[np.ndarray]:
    """Rows in runs of about GATHERED_BYTES, each at least one row."""
    number = (np.cumsum(sizes) - sizes) // max(GATHERED_BYTES, 1)
    return [part for part in np.split(rows, np.flatnonzero(np.diff(number)) + 1) if len(part)]
