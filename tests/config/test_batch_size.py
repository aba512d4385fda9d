"""The paper's tables and the arithmetic of a step."""

import math

import pytest

from megam3.config.batch_size import (
    M3_CONTRASTIVE,
    M3_UNIFIED,
    batch_arithmetic,
    bucket_edges,
    bucket_table,
    queries_in_buckets,
)
from megam3.config.schema import DataConfig
from megam3.data.plan import build_plan
from megam3.errors import ConfigError
from tests.data.pairs import data_config
from tests.data.test_plan import make_rows
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
    data = make_config(data__batch={"global_tokens": 100_000, "chunk_tokens": 10_000}).data
    for row in batch_arithmetic(data, 4):
        query = min(row.max_tokens, data.query_max_tokens)
        group = data.passages_per_query * min(row.max_tokens, data.passage_max_tokens)
        assert row.global_queries == max(1, 100_000 // (query + group))
        assert row.queries_per_rank == math.ceil(row.global_queries / 4)
        assert row.passages_per_rank == row.queries_per_rank * data.passages_per_query
        assert row.max_tokens_per_rank == row.queries_per_rank * (query + group)
        assert row.chunks_per_rank == math.ceil(row.max_tokens_per_rank / 10_000)


def test_arithmetic_of_a_wrong_batch_is_empty() -> None:
    assert batch_arithmetic(make_config(data__batch={}).data, 1) == []
    assert batch_arithmetic(make_config(data__length_buckets=[64, 16]).data, 1) == []


def test_plan_and_arithmetic_agree_where_a_dataset_has_groups_of_its_own() -> None:
    """global_tokens 1 000 000, groups of 2 and a dataset with 16: the data serve 114 queries, not 651."""
    data = data_config(
        "x",
        dataset={"passages_per_query": 16},
        batch={"global_tokens": 1_000_000},
        passages_per_query=2,
        query_max_tokens=512,
        passage_max_tokens=512,
        length_buckets=[512],
    )
    (row,) = batch_arithmetic(data, 1)
    assert (row.global_queries, row.queries_per_rank, row.passages_per_rank) == (114, 114, 1824)
    plan = build_plan(data, [make_rows([[(0, 512)] * 342], passages_per_query=16)], 0)
    assert {(len(plan.batch(number).rows)) for number in range(plan.num_batches)} == {114}
    (step,) = queries_in_buckets(data, 2)
    assert (step.queries, step.passages) == (651, 1302)


def test_the_largest_group_of_any_dataset_counts() -> None:
    data = make_config(data__train__0__passages_per_query=16).data
    assert batch_arithmetic(data, 1)[0].passages_per_rank == 8 * 16


PAPER = {"query_max_tokens": 512, "passage_max_tokens": 8192}


def queries(data: DataConfig, passages_per_query: int, is_text: bool = False) -> list[int]:
    return [step.queries for step in queries_in_buckets(data, passages_per_query, is_text)]


def test_papers_tables() -> None:
    """arXiv 2402.03216, table 9."""
    config = data_config("x", batch={"buckets": "m3_unified"}, **PAPER)
    assert bucket_edges(config) == [500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8192]
    assert queries(config, 8) == [1152, 768, 480, 432, 336, 336, 288, 240, 192]
    config = data_config("x", batch={"buckets": "m3_contrastive"}, **PAPER)
    assert queries(config, 1) == [67200, 54720, 37248, 27648, 21504, 17280, 15072, 12288, 9984]


def test_token_budget_holds_in_the_worst_case() -> None:
    config = data_config("x", batch={"global_tokens": 10_000})
    for edge, number in zip(bucket_edges(config), queries(config, 4), strict=True):
        worst = min(edge, 32) + 4 * edge
        assert number * worst <= 10_000 < (number + 1) * worst
    assert queries(config, 4, is_text=True) == [10_000 // edge for edge in bucket_edges(config)]


def test_last_bucket_is_the_limit() -> None:
    assert bucket_edges(data_config("x", length_buckets=[16, 64, 500])) == [16, 64, 128]


def test_buckets_must_ascend_and_reach_the_limit() -> None:
    with pytest.raises(
        ConfigError, match=r"data.length_buckets = \[64, 16\]: upper edges must ascend; sort them"
    ):
        bucket_edges(data_config("x", length_buckets=[64, 16]))
    with pytest.raises(
        ConfigError,
        match=r"data.batch.buckets = 64: texts of up to 128 tokens belong to no bucket; "
        "add a bucket with max_tokens: 128",
    ):
        bucket_edges(data_config("x", batch={"buckets": [{"max_tokens": 64, "global_queries": 8}]}))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({}, "data.batch = None: exactly one of global_queries, global_tokens and buckets says"),
        (
            {"global_queries": 8, "global_tokens": 100},
            "data.batch = {.*}: exactly one of .*; keep one and set the others to null",
        ),
    ],
)
def test_exactly_one_size(batch: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        queries(data_config("x", batch=batch | {"accumulation_steps": 1}), 1)
