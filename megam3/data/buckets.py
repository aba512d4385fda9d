"""Length buckets and how many queries a step takes in each."""

from __future__ import annotations

from megam3.config.batch_size import bucket_table
from megam3.config.schema import DataConfig
from megam3.errors import ConfigError


def bucket_edges(config: DataConfig) -> list[int]:
    """Upper edges of the length buckets in tokens, ascending; the last one holds the longest text the limits allow.

    Raises:
        ConfigError: edges that do not ascend, or a table that ends below the limits.
    """
    table, longest = bucket_table(config.batch), max(config.query_max_tokens, config.passage_max_tokens)
    edges = (
        [row.max_tokens for row in table]
        if table
        else [*(e for e in config.length_buckets if e < longest), longest]
    )
    field = "data.batch.buckets" if table else "data.length_buckets"
    if edges != sorted(set(edges)):
        raise ConfigError(field, edges, "must ascend", "sort the buckets by tokens and name each edge once")
    if edges[-1] < longest:
        rule = f"must reach the longest text, {longest} tokens"
        raise ConfigError(
            field, edges, rule, f"add a bucket of {longest} tokens, or lower data.passage_max_tokens"
        )
    return edges


def bucket_queries(config: DataConfig, passages_per_query: int, is_text: bool) -> list[int]:
    """Queries (or texts) of a step in each bucket, over all ranks.

    With a token budget the number fits even when every text is as long as the bucket's edge: memory is never a matter of luck.

    Raises:
        ConfigError: none or several of the three ways to give a size.
    """
    batch, edges = config.batch, bucket_edges(config)
    given = [
        name for name in ("global_queries", "global_tokens", "buckets") if getattr(batch, name) is not None
    ]
    if len(given) != 1:
        raise ConfigError(
            "data.batch",
            given,
            "must give exactly one of global_queries, global_tokens and buckets",
            "keep one of them",
        )
    if batch.global_queries is not None:
        return [batch.global_queries] * len(edges)
    table = bucket_table(batch)
    if table is not None:
        return [row.global_queries for row in table]
    assert batch.global_tokens is not None
    limits = [(min(edge, config.query_max_tokens), min(edge, config.passage_max_tokens)) for edge in edges]
    worst = [passage if is_text else query + passages_per_query * passage for query, passage in limits]
    return [max(1, batch.global_tokens // tokens) for tokens in worst]
