import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megam3.cost import assign_ranks, plan_chunks, text_cost


def test_cost_is_what_attention_and_matrices_take():
    """Against FLOPs of a layer of width 1024: 24·h² a token, and 4·h·L a token for scores and their use."""
    lengths = np.array([1, 512, 2048, 8192])
    flops = 24 * 1024**2 * lengths + 4 * 1024 * lengths**2
    np.testing.assert_allclose(text_cost(lengths) / text_cost(lengths[:1]), flops / flops[0], rtol=1e-12)


@given(costs=st.lists(st.floats(0, 1e6), min_size=1, max_size=60), data=st.data())
def test_every_row_once_and_no_rank_without(costs, data):
    world_size = data.draw(st.integers(1, len(costs)))
    shares = assign_ranks(np.array(costs), world_size)
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(costs)))
    assert len(shares) == world_size
    assert all(len(share) for share in shares)


@given(st.lists(st.integers(1, 8192), min_size=16, max_size=80))
def test_never_worse_than_grahams_bound(lengths):
    costs = text_cost(np.array(lengths))
    loads = [costs[share].sum() for share in assign_ranks(costs, 8)]
    # whoever ends last was the least loaded before its last row (Graham 1966)
    assert max(loads) <= (costs.sum() + 7 * costs.max()) / 8 * (1 + 1e-9)


def test_too_few_rows():
    with pytest.raises(ValueError, match="2 queries cannot be shared by 3 ranks"):
        assign_ranks(np.ones(2), 3)


@given(st.lists(st.integers(1, 400), max_size=60), st.integers(50, 1000))
def test_chunks_cover_in_order_within_budget_and_are_fewest(lengths, budget):
    spans = plan_chunks(lengths, budget)
    assert [index for start, stop in spans for index in range(start, stop)] == list(range(len(lengths)))
    assert all(stop == start + 1 or sum(lengths[start:stop]) <= budget for start, stop in spans)
    fewest, room = 0, 0
    for length in lengths:
        fewest, room = (fewest, room - length) if length <= room else (fewest + 1, max(0, budget - length))
    assert len(spans) == fewest


def test_chunks_are_even():
    costs = [text_cost(np.array([100] * (stop - start))).sum() for start, stop in plan_chunks([100] * 9, 800)]
    assert max(costs) / min(costs) == pytest.approx(5 / 4)
