"""How many queries a step holds, by length bucket: the paper's tables, and the arithmetic, in one place.

The plan of the data, `megam3 show-config`, the checks of a recipe and the estimate of memory all ask here:

    m3_unified on 8 ranks, bucket 0–500         1152 queries a step = 144 a rank
    global_tokens 1 000 000, queries and passages of at most 512 tokens
        groups of 2 passages                    1 000 000 // (512 + 2 · 512)  = 651 queries, 1302 passages
        groups of 16 passages (a dataset's own) 1 000 000 // (512 + 16 · 512) = 114 queries, 1824 passages
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megam3.config.schema import BatchConfig, BucketConfig, DataConfig
from megam3.errors import ConfigError, raise_all

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
    """The rows of `batch.buckets` or of the preset it names; None when the batch is sized otherwise."""
    if batch.buckets is None:
        return None
    return PRESETS[batch.buckets] if isinstance(batch.buckets, str) else tuple(batch.buckets)


def size_problems(data: DataConfig) -> Iterator[ConfigError]:
    """Exactly one of global_queries, global_tokens and buckets."""
    names = ("global_queries", "global_tokens", "buckets")
    given = {name: value for name in names if (value := getattr(data.batch, name)) is not None}
    rule = "exactly one of global_queries, global_tokens and buckets says how large a step is"
    if not given:
        yield ConfigError("data.batch", None, rule, "set one, for example data.batch.global_queries=64")
    if len(given) > 1:
        remedy = f"keep one and set the others to null: {', '.join(given)}"
        yield ConfigError("data.batch", given, rule, remedy)


def edge_problems(data: DataConfig) -> Iterator[ConfigError]:
    """Upper edges of length buckets ascend and cover the longest text."""
    table = bucket_table(data.batch)
    field = "data.length_buckets" if table is None else "data.batch.buckets"
    edges = list(data.length_buckets) if table is None else [row.max_tokens for row in table]
    longest = longest_text(data)
    if not edges:
        yield ConfigError(field, [], "needs at least one bucket", f"add one that covers {longest} tokens")
    elif any(first >= second for first, second in zip(edges, edges[1:], strict=False)):
        yield ConfigError(field, edges, "upper edges must ascend", "sort them and remove repeated ones")
    elif table is not None and edges[-1] < longest:
        rule = f"texts of up to {longest} tokens belong to no bucket"
        remedy = f"add a bucket with max_tokens: {longest}, or lower data.passage_max_tokens"
        yield ConfigError(field, edges[-1], rule, remedy)


def longest_text(data: DataConfig) -> int:
    """Tokens of the longest text that the limits allow."""
    return max(data.query_max_tokens, data.passage_max_tokens)


def bucket_edges(data: DataConfig) -> list[int]:
    """Upper edges of the length buckets in tokens, ascending; the last holds the longest text allowed.

    Raises:
        ConfigError: edges that do not ascend, or a table that ends below the limits.
    """
    raise_all(edge_problems(data))
    table, longest = bucket_table(data.batch), longest_text(data)
    if table is not None:
        return [row.max_tokens for row in table]
    return [*(edge for edge in data.length_buckets if edge < longest), longest]


@dataclass(frozen=True, kw_only=True)
class BucketStep:
    """One step of one length bucket over all ranks, every text as long as bucket and limit allow."""

    max_tokens: int
    """Upper edge of the bucket."""
    query_tokens: int
    """Of each query; 0 for texts without queries."""
    passage_tokens: int
    """Of each passage."""
    queries: int
    """Queries, or texts for pretraining."""
    passages: int
    """At most: records with few negatives give smaller groups."""

    @property
    def tokens(self) -> int:
        """Tokens encoded."""
        return self.queries * self.query_tokens + self.passages * self.passage_tokens


def queries_in_buckets(data: DataConfig, passages_per_query: int, is_text: bool = False) -> list[BucketStep]:
    """The step of each bucket for groups of one positive and this many minus one negatives, to which
    `data.positives_per_query` adds; `is_text`: texts for pretraining, one passage each.

    With a token budget the number fits even when every text is as long as the bucket's edge: memory is never
    a matter of luck.

    Raises:
        ConfigError: none or several of the three ways to give a size, or edges that do not fit the limits.
    """
    raise_all(size_problems(data))
    batch, table = data.batch, bucket_table(data.batch)
    steps = []
    for index, edge in enumerate(bucket_edges(data)):
        query_tokens = 0 if is_text else min(edge, data.query_max_tokens)
        passage_tokens = min(edge, data.passage_max_tokens)
        group = 1 if is_text else passages_per_query + data.positives_per_query - 1
        if table is not None:
            queries = table[index].global_queries
        elif batch.global_queries is not None:
            queries = batch.global_queries
        else:
            assert batch.global_tokens is not None
            queries = max(1, batch.global_tokens // (query_tokens + group * passage_tokens))
        steps.append(
            BucketStep(
                max_tokens=edge,
                query_tokens=query_tokens,
                passage_tokens=passage_tokens,
                queries=queries,
                passages=queries * group,
            )
        )
    return steps


def group_sizes(data: DataConfig) -> list[int]:
    """Passages per query of each dataset of the recipe, in its order."""
    return [dataset.passages_per_query or data.passages_per_query for dataset in data.train]


@dataclass(frozen=True, kw_only=True)
class BatchRow:
    """One length bucket of one step, for the dataset with the largest groups: it makes the most passages."""

    max_tokens: int
    """Longest text of a row in this bucket."""
    global_queries: int
    """Queries a step over all ranks."""
    queries_per_rank: int
    """At most, where ranks cannot share them equally."""
    passages_per_rank: int
    """At most: records with few negatives give smaller groups."""
    max_tokens_per_rank: int
    """Tokens one rank encodes when every text has the bucket's full length (queries: their own limit)."""
    chunks_per_rank: int
    """Forward passes of the gradient cache at most; 1 without it."""


def batch_arithmetic(data: DataConfig, world_size: int) -> list[BatchRow]:
    """The rows of one step on `world_size` ranks, one for each bucket; none when the batch is wrong.

    `megam3 show-config` shows a recipe with mistakes too, and the checks name them afterwards.
    """
    if any(size_problems(data)) or any(edge_problems(data)):
        return []
    largest_group = max(group_sizes(data), default=data.passages_per_query)
    return [_row(data, step, world_size) for step in queries_in_buckets(data, largest_group)]


def _row(data: DataConfig, step: BucketStep, world_size: int) -> BatchRow:
    # a table or a fixed number divides over the ranks (a check); what fits a token budget need not, and a
    # rank may get one more than the mean
    queries = -(-step.queries // world_size)
    passages = queries * (step.passages // step.queries)
    tokens = queries * step.query_tokens + passages * step.passage_tokens
    chunk = data.batch.chunk_tokens
    return BatchRow(
        max_tokens=step.max_tokens,
        global_queries=step.queries,
        queries_per_rank=queries,
        passages_per_rank=passages,
        max_tokens_per_rank=tokens,
        chunks_per_rank=-(-tokens // chunk) if chunk else 1,
    )
