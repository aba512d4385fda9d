import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megam3.retrieval.topk import NO_ROW, Hits, empty_hits, merge_hits, sort_by_score, top_k


def brute_force(scores, rows, count):
    """Sort by score, then by row, in plain Python."""
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], rows[i]))[:count]
    return [scores[i] for i in order], [rows[i] if scores[i] > -np.inf else NO_ROW for i in order]


scores_lists = st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, -np.inf]), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(scores=scores_lists, count=st.integers(1, 12))
def test_top_k_with_ties_equals_a_full_sort(scores, count):
    hits = top_k(torch.tensor([scores]), torch.arange(len(scores))[None], count)
    expected_scores, expected_rows = brute_force(scores, list(range(len(scores))), count)
    assert hits.scores_QK[0].tolist() == expected_scores
    assert hits.rows_QK[0].tolist() == expected_rows


@settings(max_examples=100, deadline=None)
@given(scores=scores_lists, count=st.integers(1, 12), cuts=st.integers(1, 5), shuffled=st.randoms())
def test_merging_chunks_in_any_split_equals_one_pass(scores, count, cuts, shuffled):
    rows = list(range(len(scores)))
    merged = empty_hits(1)
    for part in range(cuts):
        own = rows[part::cuts]
        if own:
            merged = merge_hits(
                merged, Hits(torch.tensor([[scores[row] for row in own]]), torch.tensor([own])), count
            )
    expected_scores, expected_rows = brute_force(scores, rows, count)
    assert merged.scores_QK[0].tolist() == expected_scores
    assert merged.rows_QK[0].tolist() == expected_rows
    order = rows[:]
    shuffled.shuffle(order)
    mixed = sort_by_score(torch.tensor([[scores[row] for row in order]]), torch.tensor([order]), count)
    assert mixed.rows_QK[0].tolist() == expected_rows
