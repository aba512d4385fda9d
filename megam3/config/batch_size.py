"""How many queries a step holds, by length bucket: the paper's tables, and the arithmetic that `megam3 show-config` prints.

m3_unified on 8 ranks, bucket 0–500: 1152 queries a step = 144 a rank
"""

from __future__ import annotations

from dataclasses import dataclass

from megam3.config.schema import BatchConfig, BucketConfig, DataConfig

_EDGES = (500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8192)


def _table(*global_queries: int) -> tuple[BucketConfig, ...]:
    return tuple(
        BucketConfig(max_tokens=edge, global_queries=queries)
        for edge, queries in zip(_EDGES, global_queries, strict=True)
    )


M3_CONTRASTIVE = _table(67_200, 54_720, 37_248, 27_648, 21_504, 17_280, 15_072, 12_288, 9_984)
"""Contrastive pre-training, 96 GPUs (arXiv 2402.03216, table 9)."""

M3_UNIFIED = _table(1_152, 768, 480, 432, 336, 336, 288, 240, 192)
"""Unified fine-tuning, 24 GPUs (arXiv 2402.03216, table 9)."""

PRESETS = {"m3_contrastive": M3_CONTRASTIVE, "m3_unified": M3_UNIFIED}


def bucket_table(batch: BatchConfig) -> tuple[BucketConfig, ...] | None:
    """The rows of `batch.buckets`, a preset's rows when it names one; None when the batch is sized otherwise."""
    if batch.buckets is None:
        return None
    return PRESETS[batch.buckets] if isinstance(batch.buckets, str) else tuple(batch.buckets)


@dataclass(frozen=True)
class BatchRow:
    """One length bucket of one step."""

    max_tokens: int
    """Longest text of a row in this bucket."""
    global_queries: int | None
    """Queries a step over all ranks; None: as many as fit the token budget."""
    queries_per_rank: int | None
    passages_per_rank: int | None
    """At most: records with few negatives give smaller groups."""
    max_tokens_per_rank: int
    """Tokens one rank encodes when every text has the bucket's full length (queries: their own limit)."""
    chunks_per_rank: int
    """Forward passes of the gradient cache at most; 1 without it."""


def batch_arithmetic(data: DataConfig, world_size: int) -> list[BatchRow]:
    """The rows of one step on `world_size` ranks, one for each length bucket."""
    batch, table = data.batch, bucket_table(data.batch)
    if table is not None:
        sizes: list[tuple[int, int | None]] = [(row.max_tokens, row.global_queries) for row in table]
    else:
        longest = max(data.query_max_tokens, data.passage_max_tokens)
        edges = [edge for edge in data.length_buckets if edge < longest] + [longest]
        sizes = [(edge, batch.global_queries) for edge in edges]
    return [_row(data, edge, queries, world_size) for edge, queries in sizes]


def _row(data: DataConfig, edge: int, global_queries: int | None, world_size: int) -> BatchRow:
    group = max([data.passages_per_query, *(dataset.passages_per_query or 0 for dataset in data.train)])
    query_tokens, passage_tokens = min(edge, data.query_max_tokens), min(edge, data.passage_max_tokens)
    if global_queries is None:
        queries = passages = None
        tokens = (data.batch.global_tokens or 0) // world_size
    else:
        queries = global_queries // world_size
        passages = queries * group
        tokens = queries * query_tokens + passages * passage_tokens
    chunk = data.batch.chunk_tokens
    return BatchRow(edge, global_queries, queries, passages, tokens, -(-tokens // chunk) if chunk else 1)
