"""Retrieval metrics per query by pytrec_eval (the C code of trec_eval), and their means over groups of
queries.

nDCG@10 = DCG of the first ten / best possible DCG, with gain = grade and discount log2(rank + 1); Recall@100
= share of the relevant passages (grade > 0) among the first hundred; MRR@10 = 1 / rank of the first relevant
passage among the first ten, else 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytrec_eval

METRICS = ("ndcg@10", "recall@100", "mrr@10")
DEPTH = 100
"""Ranks that matter to any metric."""
SEARCHED = DEPTH + 1
"""Passages that are searched for: one of them may be the query itself."""


def score_rankings(
    qrels: Mapping[str, Mapping[str, int]], rankings: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Metrics of every query in `qrels` from its ranking (passage ids, best first); a query without a ranking
    scores 0."""

    def run(depth: int) -> dict[str, dict[str, float]]:
        # trec_eval sorts by score and breaks ties by id; ranks as scores keep our order
        return {
            query: {passage: float(-rank) for rank, passage in enumerate(rankings.get(query, ())[:depth])}
            for query in qrels
        }

    judged = {query: dict(grades) for query, grades in qrels.items()}
    wide = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.100"}).evaluate(run(DEPTH))
    narrow = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(run(10))
    results = {}
    for query in qrels:
        deep, top = wide.get(query, {}), narrow.get(query, {})
        values = deep.get("ndcg_cut_10", 0.0), deep.get("recall_100", 0.0), top.get("recip_rank", 0.0)
        results[query] = dict(zip(METRICS, values))
    return results


def mean_metrics(per_query: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric; 0 without queries."""
    count = max(len(per_query), 1)
    return {name: sum(values[name] for values in per_query) / count for name in METRICS}


def mean_by_group(
    per_query: Mapping[str, Mapping[str, float]], group_of: Mapping[str, str]
) -> dict[str, dict[str, float]]:
    """Means over the queries of each group, in the order in which groups first appear, with their size under
    `queries`."""
    members: dict[str, list[Mapping[str, float]]] = {}
    for query, group in group_of.items():
        members.setdefault(group, []).append(per_query[query])
    return {
        group: {"queries": float(len(values)), **mean_metrics(values)} for group, values in members.items()
    }
