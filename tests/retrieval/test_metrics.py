"""A table worked out by hand.

query  qrels      ranking                 nDCG@10                             Recall@100  MRR@10
a      x:1        x ...                   1                               1           1
b      x:1        y z x                   1/log2(4) = 0.5                 1           1/3
c      x:2 y:1    y x                     (1/1 + 2/log2 3) / (2/1 + 1/log2 3)  1        1
d      x:1 y:1    x at 1, y at 101        1 / (1 + 1/log2 3)              1/2         1
e      x:1        x at 11                 0                               1           0
f      x:1        nothing                 0                               0           0
"""

import math

import pytest

from megam3.retrieval.metrics import mean_by_group, mean_metrics, score_rankings

LOG3 = math.log2(3)
FILL = [f"n{i}" for i in range(200)]
QRELS = {
    "a": {"x": 1},
    "b": {"x": 1, "y": 0},
    "c": {"x": 2, "y": 1},
    "d": {"x": 1, "y": 1},
    "e": {"x": 1},
    "f": {"x": 1},
}
RANKINGS = {
    "a": ["x", *FILL],
    "b": ["y", "z", "x"],
    "c": ["y", "x"],
    "d": ["x", *FILL[:99], "y"],
    "e": [*FILL[:10], "x"],
}
EXPECTED = {
    "a": (1, 1, 1),
    "b": (0.5, 1, 1 / 3),
    "c": ((1 + 2 / LOG3) / (2 + 1 / LOG3), 1, 1),
    "d": (1 / (1 + 1 / LOG3), 0.5, 1),
    "e": (0, 1, 0),
    "f": (0, 0, 0),
}


@pytest.mark.parametrize("query", list(EXPECTED))
def test_table(query):
    values = score_rankings(QRELS, RANKINGS)[query]
    assert (values["ndcg@10"], values["recall@100"], values["mrr@10"]) == pytest.approx(EXPECTED[query])


def test_means_overall_and_by_group():
    per_query = score_rankings(QRELS, RANKINGS)
    overall = mean_metrics(list(per_query.values()))
    assert overall["recall@100"] == pytest.approx(4.5 / 6)
    groups = mean_by_group(per_query, {"f": "de", "a": "en", "b": "en"})
    assert list(groups) == ["de", "en"]
    assert groups["en"]["queries"] == 2
    assert groups["en"]["mrr@10"] == pytest.approx((1 + 1 / 3) / 2)
    assert groups["de"]["ndcg@10"] == 0
    assert mean_metrics([])["ndcg@10"] == 0
