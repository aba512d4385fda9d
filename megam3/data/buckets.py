"""Length buckets and how many queries a step takes in each."""

from __future__ import annotations

from megam3.config.schema import BatchConfig, BucketConfig, DataConfig
from megam3.errors import ConfigError

PAPER_EDGES = (500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8192)
PAPER_TABLES = {
    # arXiv 2402.03216, table 9: queries of the global batch for fine-tuning on pairs, and for unified fine-tuning
    "m3_contrastive": (67200, 54720, 37248, 27648, 21504, 17280, 15072, 12288, 9984),
    "m3_unified": (1152, 768, 480, 432, 336, 336, 288, 240, 192),
}


def bucket_edges(config: DataConfig) -> list[int]:
    """Upper edges of the length buckets in tokens, ascending.

    Raises:
        ConfigError: edges that do not ascend.
    """
    table = _table(config.batch)
    edges = [bucket.max_tokens for bucket in table] if table else list(config.length_buckets)
    if edges != sorted(set(edges)):
        field = "data.batch.buckets" if table else "data.length_buckets"
        raise ConfigError(field, edges, "must ascend", "sort the buckets by tokens and name each edge once")
    return edges


def bucket_queries(config: DataConfig, passages_per_query: int, is_text: bool) -> list[int]:
    """Queries (or texts) of a step in each bucket, over all ranks.

    With a token budget the number fits even when every text is as long as the bucket's edge: memory is never a matter of luck.

    Raises:
        ConfigError: none or several of the three ways to give a size.
    """
    batch, edges = config.batch, bucket_edges(config)
    given = [name for name in ("global_queries", "global_tokens", "buckets") if getattr(batch, name) is not None]
    if len(given) != 1:
        raise ConfigError("data.batch", given, "must give exactly one of global_queries, global_tokens and buckets", "keep one of them")
    if batch.global_queries is not None:
        return [batch.global_queries] * len(edges)
    table = _table(batch)
    if table:
        return [bucket.global_queries for bucket in table]
    assert batch.global_tokens is not None
    limits = [(min(edge, config.query_max_tokens), min(edge, config.passage_max_tokens)) for edge in edges]
    worst = [passage if is_text else query + passages_per_query * passage for query, passage in limits]
    return [max(1, batch.global_tokens // tokens) for tokens in worst]


def _table(batch: BatchConfig) -> list[BucketConfig]:
    if isinstance(batch.buckets, str):
        return [BucketConfig(max_tokens=e, global_queries=q) for e, q in zip(PAPER_EDGES, PAPER_TABLES[batch.buckets])]
    return batch.buckets or []
