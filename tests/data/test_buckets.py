import pytest

from megam3.data.buckets import bucket_edges, bucket_queries
from megam3.errors import ConfigError
from tests.data.pairs import data_config

PAPER = {"query_max_tokens": 512, "passage_max_tokens": 8192}


def test_papers_tables():
    """arXiv 2402.03216, table 9."""
    config = data_config("x", batch={"buckets": "m3_unified"}, **PAPER)
    assert bucket_edges(config) == [500, 1000, 2000, 3000, 4000, 5000, 6000, 7000, 8192]
    assert bucket_queries(config, 8, False) == [1152, 768, 480, 432, 336, 336, 288, 240, 192]
    config = data_config("x", batch={"buckets": "m3_contrastive"}, **PAPER)
    assert bucket_queries(config, 1, False) == [67200, 54720, 37248, 27648, 21504, 17280, 15072, 12288, 9984]


def test_token_budget_holds_in_the_worst_case():
    config = data_config("x", batch={"global_tokens": 10_000})
    for edge, queries in zip(bucket_edges(config), bucket_queries(config, 4, False)):
        worst = min(edge, 32) + 4 * edge
        assert queries * worst <= 10_000 < (queries + 1) * worst
    assert bucket_queries(config, 4, True) == [10_000 // edge for edge in bucket_edges(config)]


def test_last_bucket_is_the_limit():
    assert bucket_edges(data_config("x", length_buckets=[16, 64, 500])) == [16, 64, 128]


def test_buckets_must_ascend_and_reach_the_limit():
    with pytest.raises(
        ConfigError, match=r"data.length_buckets = \[64, 16, 128\]: must ascend; sort the buckets"
    ):
        bucket_edges(data_config("x", length_buckets=[64, 16]))
    with pytest.raises(
        ConfigError,
        match=r"data.batch.buckets = \[64\]: must reach the longest text, 128 tokens; add a bucket of 128",
    ):
        bucket_edges(data_config("x", batch={"buckets": [{"max_tokens": 64, "global_queries": 8}]}))


@pytest.mark.parametrize("batch", [{}, {"global_queries": 8, "global_tokens": 100}])
def test_exactly_one_size(batch):
    with pytest.raises(
        ConfigError,
        match="data.batch = .*: must give exactly one of global_queries, global_tokens and buckets",
    ):
        bucket_queries(data_config("x", batch=batch | {"accumulation_steps": 1}), 1, False)
