"""The five modes of the M3 paper (arXiv 2402.03216, section 4.1) and BM25 on one test set.

Dense         all passages by the dense score
Sparse        all passages by the lexical score
Multi-vec     Dense's best `rerank_dense` by the multi-vector score
Dense+Sparse  the best `rerank_hybrid` of Dense and of Sparse by the weighted sum of both scores
All           the same passages by the weighted sum of three
BM25          all passages, over the model's own tokens
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from megam3.config.schema import MODE_HEADS, EvaluationConfig, Mode
from megam3.config.weights import HEADS
from megam3.dist import comm
from megam3.errors import ConfigError
from megam3.retrieval.answers import answer_qrels
from megam3.retrieval.beir import BeirDataset
from megam3.retrieval.bm25 import bm25_hits, find_framing
from megam3.retrieval.encode import EncodedTexts, EncodeIds, encode_texts, multi_vector_rows
from megam3.retrieval.metrics import SEARCHED, mean_by_group, mean_metrics, score_rankings
from megam3.retrieval.results import EvaluationResult, ModeResult
from megam3.retrieval.search import (
    Candidates,
    best_of,
    dense_blocks,
    lexical_blocks,
    local_candidates,
    score_candidates,
    unite,
)
from megam3.retrieval.topk import NO_ROW, Hits, empty_hits, sort_by_score

MODES: tuple[str, ...] = (*MODE_HEADS, "BM25")
LENGTH_EDGES = (128, 256, 512, 1024, 2048, 4096, 8192)
"""Upper edges, in tokens of a query's longest relevant passage, of the length buckets in a result."""

QUERY_LENGTH_EDGES = (8, 16, 32, 64, 128, 256, 512)
"""The same of the query's own tokens, special ones included."""

Tokenize = Callable[[Sequence[str], int], list[list[int]]]
"""(texts, most tokens) -> ids with special tokens, cut at the limit."""


@dataclass(frozen=True)
class _Tokenised:
    query_ids: list[list[int]]
    passage_ids: list[list[int]]


def offered_modes(heads: Collection[str]) -> tuple[str, ...]:
    """The modes that a model with these heads can be searched in, BM25 among them.

    >>> offered_modes(["dense", "multi_vector"])
    ('Dense', 'Multi-vec', 'BM25')
    """
    held = {"dense", *heads}
    return (*(mode for mode, needed in MODE_HEADS.items() if held.issuperset(needed)), "BM25")


def check_modes(modes: Sequence[str], heads: Collection[str] = HEADS) -> None:
    """The modes exist, and a model with these heads has what they need.

    Raises:
        ConfigError: one does not, or has not.
    """
    offered = offered_modes(heads)
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(
                "modes", mode, f"must be among {', '.join(MODES)}", "check the spelling, capitals included"
            )
        if mode not in offered:
            needed = MODE_HEADS[cast(Mode, mode)]
            missing = ", ".join(head for head in HEADS if head in needed and head not in heads)
            rule = f"needs the heads {missing}, which the model does not have"
            raise ConfigError("modes", mode, rule, f"choose among {', '.join(offered)}")


def length_bucket(num_tokens: int, edges: Sequence[int] = LENGTH_EDGES) -> str:
    """Name of the bucket a token count falls in.

    >>> length_bucket(512), length_bucket(513), length_bucket(9000)
    ('257-512', '513-1024', 'over 8192')
    """
    low = 1
    for edge in edges:
        if num_tokens <= edge:
            return f"{low}-{edge}"
        low = edge + 1
    return f"over {edges[-1]}"


def rank_candidates(candidates: Candidates, config: EvaluationConfig) -> dict[str, Hits]:
    """Rankings of the three modes that re-rank."""
    rows_QK = candidates.rows_QK
    column_K = torch.arange(rows_QK.shape[1])
    is_dense_K = column_K < candidates.num_dense
    hybrid_QK = ~is_dense_K | (column_K < config.rerank_hybrid) | candidates.also_lexical_QK
    weights = config.weights
    two_QK = weights.dense * candidates.dense_QK + weights.lexical * candidates.lexical_QK
    three_QK = two_QK + weights.multi_vector * candidates.multi_vector_QK

    def ranked(scores_QK: Tensor, allowed_QK: Tensor) -> Hits:
        return sort_by_score(
            scores_QK.masked_fill(~allowed_QK | (rows_QK == NO_ROW), -torch.inf), rows_QK, SEARCHED
        )

    return {
        "Multi-vec": ranked(
            candidates.multi_vector_QK,
            (column_K < min(config.rerank_dense, candidates.num_dense)).expand_as(rows_QK),
        ),
        "Dense+Sparse": ranked(two_QK, hybrid_QK),
        "All": ranked(three_QK, hybrid_QK),
    }


def _tokenise(dataset: BeirDataset, tokenize: Tokenize, config: EvaluationConfig) -> _Tokenised:
    """Queries and passages with what is put before them."""
    before_query, before_passage = config.query_instruction or "", config.passage_instruction or ""
    return _Tokenised(
        tokenize([before_query + text for text in dataset.queries], config.query_max_tokens),
        tokenize([before_passage + text for text in dataset.passages], config.passage_max_tokens),
    )


def _search(
    texts: _Tokenised, encode_ids: EncodeIds, config: EvaluationConfig, modes: Sequence[str]
) -> dict[str, Hits]:
    """Rankings of the five modes, the same on every rank."""
    own_ids = texts.passage_ids[comm.rank() :: comm.world_size()]
    queries = encode_texts(
        encode_ids, texts.query_ids, config.batch_tokens, torch.float32, multi_bytes=1 << 62
    )
    passages = encode_texts(encode_ids, own_ids, config.batch_tokens)
    num_queries = queries.num_texts
    dense = best_of(
        dense_blocks(queries, passages), num_queries, max(config.rerank_dense, config.rerank_hybrid, SEARCHED)
    )
    depth = max(config.rerank_hybrid, SEARCHED)
    if {"Sparse", "Dense+Sparse", "All"}.intersection(modes):
        lexical = best_of(lexical_blocks(queries, passages), num_queries, depth, positive_only=True)
    else:
        lexical = empty_hits(num_queries)
    hits = {"Dense": dense, "Sparse": lexical}
    if {"Multi-vec", "Dense+Sparse", "All"}.intersection(modes):
        with_multi = {"Multi-vec", "All"}.intersection(modes)
        hits |= _rerank(queries, passages, hits, own_ids, encode_ids, config, bool(with_multi))
    return hits


def _rerank(
    queries: EncodedTexts,
    passages: EncodedTexts,
    hits: dict[str, Hits],
    own_ids: list[list[int]],
    encode_ids: EncodeIds,
    config: EvaluationConfig,
    with_multi: bool,
) -> dict[str, Hits]:
    dense = hits["Dense"].first(max(config.rerank_dense, config.rerank_hybrid))
    lexical = hits["Sparse"].first(config.rerank_hybrid)
    united = unite(dense, lexical)
    wanted = local_candidates(united[0])
    rows = (
        multi_vector_rows(passages, sorted(wanted), encode_ids, own_ids, config.batch_tokens)
        if with_multi
        else None
    )
    return rank_candidates(score_candidates(queries, passages, dense, rows, wanted, united), config)


def _without_itself(dataset: BeirDataset, query: str, ranking: list[str]) -> list[str]:
    """Without the passage that has the query's id: in ArguAna and Quora queries are passages of the corpus,
    and BEIR's own evaluation leaves them out. One that is judged relevant stays: ids of two counters may
    coincide."""
    if dataset.answers is not None or dataset.qrels[query].get(query, 0) > 0:
        return ranking
    return [passage for passage in ranking if passage != query]


def _mode_result(
    dataset: BeirDataset, hits: Hits, buckets: dict[str, str], query_buckets: dict[str, str]
) -> ModeResult:
    rankings = {
        query: _without_itself(dataset, query, [dataset.passage_ids[row] for row in rows if row != NO_ROW])
        for query, rows in zip(dataset.query_ids, hits.first(SEARCHED).rows_QK.tolist())
    }
    qrels = dataset.qrels
    if dataset.answers is not None:
        found = set(hits.first(SEARCHED).rows_QK.flatten().tolist()) - {NO_ROW}
        texts = {dataset.passage_ids[row]: dataset.passages[row] for row in found}
        qrels = answer_qrels(dataset.answers, rankings, texts)
    per_query = score_rankings(qrels, rankings)
    languages = dict(sorted(zip(dataset.query_ids, dataset.languages), key=lambda item: item[1]))
    return ModeResult(
        mean_metrics(list(per_query.values())),
        mean_by_group(per_query, languages),
        mean_by_group(per_query, buckets),
        mean_by_group(per_query, query_buckets),
    )


def _buckets(dataset: BeirDataset, passage_tokens: Sequence[int] | np.ndarray) -> dict[str, str]:
    """query -> length bucket of its longest relevant passage, short buckets first; none where answers judge:
    which passages are relevant then depends on what a mode found."""
    if dataset.answers is not None:
        return {}
    judged = {passage for grades in dataset.qrels.values() for passage in grades}
    tokens = {
        passage: int(passage_tokens[row])
        for row, passage in enumerate(dataset.passage_ids)
        if passage in judged
    }
    longest = {
        query: max(tokens[passage] for passage, grade in dataset.qrels[query].items() if grade > 0)
        for query in dataset.query_ids
    }
    return {
        query: length_bucket(longest[query]) for query in sorted(longest, key=lambda query: longest[query])
    }


@dataclass(frozen=True, kw_only=True)
class Searched:
    """What a search of one test set found, before it is measured."""

    hits: dict[str, Hits]
    """By mode; rows are places in the dataset's `passage_ids`."""
    query_tokens: Sequence[int]
    """Tokens of each query, as it was encoded."""
    passage_tokens: Sequence[int] | np.ndarray
    seconds: float


def measure(dataset: BeirDataset, searched: Searched, config: EvaluationConfig) -> EvaluationResult:
    """Figures of each mode, over all queries and by group."""
    buckets = _buckets(dataset, searched.passage_tokens)
    query_tokens, passage_tokens = np.asarray(searched.query_tokens), np.asarray(searched.passage_tokens)
    own = sorted(zip(searched.query_tokens, dataset.query_ids))
    query_buckets = {query: length_bucket(count, QUERY_LENGTH_EDGES) for count, query in own}
    at_limit = (query_tokens >= config.query_max_tokens).sum()
    at_limit += (passage_tokens >= config.passage_max_tokens).sum()
    return EvaluationResult(
        dataset=dataset.name,
        num_queries=len(dataset.query_ids),
        num_passages=len(dataset.passage_ids),
        num_tokens=int(passage_tokens.sum()),
        num_at_limit=int(at_limit),
        seconds=searched.seconds,
        modes={
            mode: _mode_result(dataset, searched.hits[mode], buckets, query_buckets)
            for mode in MODES
            if mode in searched.hits
        },
    )


def evaluate(
    dataset: BeirDataset,
    tokenize: Tokenize,
    encode_ids: EncodeIds,
    config: EvaluationConfig,
    modes: Sequence[str] = MODES,
) -> EvaluationResult:
    """Search `dataset` in every mode and measure; all ranks call it together and get the same result.

    Raises:
        ConfigError: a name that is no mode.
        CheckpointError: the model's representations are not finite.
    """
    check_modes(modes)
    started = time.perf_counter()
    texts = _tokenise(dataset, tokenize, config)
    hits: dict[str, Hits] = {}
    if set(modes) - {"BM25"}:
        hits |= _search(texts, encode_ids, config, modes)
    if "BM25" in modes:
        # words that stand before every text tell none from another
        query_ids, passage_ids = texts.query_ids, texts.passage_ids
        if config.query_instruction:
            query_ids = tokenize(dataset.queries, config.query_max_tokens)
        if config.passage_instruction:
            passage_ids = tokenize(dataset.passages, config.passage_max_tokens)
        framing = find_framing(tokenize, config.query_max_tokens)
        hits["BM25"] = bm25_hits(query_ids, passage_ids, SEARCHED, framing)
    searched = Searched(
        hits={mode: hits[mode] for mode in modes},
        query_tokens=[len(ids) for ids in texts.query_ids],
        passage_tokens=[len(ids) for ids in texts.passage_ids],
        seconds=time.perf_counter() - started,
    )
    return measure(dataset, searched, config)
