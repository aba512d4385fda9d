"""The paper's tables and the arithmetic of a step."""

from megam3.config.batch_size import M3_CONTRASTIVE, M3_UNIFIED, batch_arithmetic, bucket_table
from tests.recipes import make_config


def test_tables_are_those_of_the_paper() -> None:
    # arXiv 2402.03216, table 9: lengths 0-500, 500-1000, 1000-2000, … 7000-8192
    assert [row.max_tokens for row in M3_UNIFIED] == [500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8192]
    assert [row.global_queries for row in M3_UNIFIED] == [1152, 768, 480, 432, 336, 336, 288, 240, 192]
    assert [row.global_queries for row in M3_CONTRASTIVE] == [
        67200,
        54720,
        37248,
        27648,
        21504,
        17280,
        15072,
        12288,
        9984,
    ]
    assert [row.max_tokens for row in M3_CONTRASTIVE] == [row.max_tokens for row in M3_UNIFIED]
    # both divide over the paper's own number of GPUs
    assert all(row.global_queries % 24 == 0 for row in M3_UNIFIED)
    assert all(row.global_queries % 96 == 0 for row in M3_CONTRASTIVE)


def test_bucket_table() -> None:
    assert bucket_table(make_config().data.batch) is None
    assert bucket_table(make_config(data__batch={"buckets": "m3_unified"}).data.batch) == M3_UNIFIED
    own = bucket_table(
        make_config(data__batch={"buckets": [{"max_tokens": 9, "global_queries": 3}]}).data.batch
    )
    assert own is not None
    assert [(row.max_tokens, row.global_queries) for row in own] == [(9, 3)]


def test_arithmetic_of_a_table() -> None:
    data = make_config(data__batch={"buckets": "m3_unified", "chunk_tokens": 65536}).data
    first, *_, last = batch_arithmetic(data, 8)
    assert (first.queries_per_rank, first.passages_per_rank) == (144, 1152)
    # 144 queries of 500 tokens and 1152 passages of 500; 648 000 / 65 536 = 9.9
    assert (first.max_tokens_per_rank, first.chunks_per_rank) == (648_000, 10)
    # 24 queries of at most 512 tokens and 192 passages of 8192
    assert last.max_tokens_per_rank == 24 * 512 + 192 * 8192


def test_arithmetic_of_a_fixed_number_takes_the_edges_and_the_longest_text() -> None:
    data = make_config(
        data__length_buckets=[64, 256, 1024], data__passage_max_tokens=512, data__query_max_tokens=32
    ).data
    rows = batch_arithmetic(data, 2)
    assert [row.max_tokens for row in rows] == [64, 256, 512]
    assert [row.max_tokens_per_rank for row in rows] == [
        4 * 32 + 32 * 64,
        4 * 32 + 32 * 256,
        4 * 32 + 32 * 512,
    ]
    assert {row.chunks_per_rank for row in rows} == {1}


def test_arithmetic_of_a_token_budget() -> None:
    row, *_ = batch_arithmetic(
        make_config(data__batch={"global_tokens": 100_000, "chunk_tokens": 10_000}).data, 4
    )
    assert (row.global_queries, row.queries_per_rank, row.max_tokens_per_rank, row.chunks_per_rank) == (
        None,
        None,
        25_000,
        3,
    )


def test_the_largest_group_of_any_dataset_counts() -> None:
    data = make_config(data__train__0__passages_per_query=16).data
    assert batch_arithmetic(data, 1)[0].passages_per_rank == 8 * 16
