"""Filters and sampling against a naive loop, one candidate at a time."""

import random

import numpy as np
import pytest

from megam3.errors import ConfigError
from megam3.retrieval.mining.select import KEPT, REASONS, SelectOptions, select_negatives


def naive_reason(rank, score, text, positives, known, query, o):
    best = min(positives) if o.positive_score == "min" else max(positives)
    if not o.low <= rank < o.high:
        return "out of range"
    if text in known:
        return "known positive"
    if text == query:
        return "the query"
    if o.margin is not None and score > best - o.margin:
        return "margin"
    if o.ratio is not None and score > (o.ratio * best if best > 0 else best - (1 - o.ratio) * -best):
        return "ratio"
    if o.max_score is not None and score > o.max_score:
        return "max score"
    if o.min_score is not None and score < o.min_score:
        return "min score"
    return KEPT


@pytest.mark.parametrize("seed", range(30))
def test_reasons_are_those_of_a_loop(seed):
    rng = random.Random(seed)

    def maybe(low, high):
        return rng.choice([None, rng.uniform(low, high)])

    options = SelectOptions(
        low=rng.randrange(4),
        high=rng.randrange(5, 40),
        negatives=rng.randrange(1, 8),
        margin=maybe(-0.1, 0.4),
        ratio=maybe(0.5, 1),
        max_score=maybe(0, 1),
        min_score=maybe(-1, 0),
        positive_score=rng.choice(["min", "max"]),
        sample=rng.choice(["random", "first"]),
    )
    scores = np.sort(np.float32([rng.uniform(-1, 1) for _ in range(30)]))[::-1]
    hashes = np.array(rng.sample(range(100), 30), dtype=np.int64)
    positives = np.float32([rng.uniform(-1, 1) for _ in range(3)])
    known, query = np.array(rng.sample(range(100), 20)), int(hashes[7])
    got = select_negatives(scores, hashes, positives, known, query, options)
    wanted = [
        naive_reason(rank, float(scores[rank]), int(hashes[rank]), positives.tolist(), known, query, options)
        for rank in range(30)
    ]
    assert [REASONS[code] for code in got.reasons] == wanted
    kept = [rank for rank, reason in enumerate(wanted) if reason == KEPT]
    assert set(got.chosen.tolist()) <= set(kept)
    assert len(got.chosen) == min(options.negatives, len(kept))
    assert got.chosen.tolist() == sorted(got.chosen.tolist())
    if options.sample == "first":
        assert got.chosen.tolist() == kept[: options.negatives]


def draw(query, seed, scores=None):
    scores = np.linspace(1, 0, 100, dtype=np.float32) if scores is None else scores
    options = SelectOptions(low=0, high=100, negatives=10, seed=seed)
    none = np.array([], dtype=np.int64)
    return select_negatives(scores, np.arange(100), np.float32([1]), none, query, options).chosen.tolist()


def test_the_draw_follows_seed_and_query():
    assert draw(-5, 0) == draw(-5, 0)
    assert draw(-5, 0) != draw(-5, 1)
    assert draw(-5, 0) != draw(-6, 0)


def test_the_draw_is_even():
    counts = np.bincount(np.concatenate([draw(q, 0) for q in range(2000)]), minlength=100)
    # 200 expected each, standard deviation 13.4
    assert counts.min() > 200 - 5 * 13.4
    assert counts.max() < 200 + 5 * 13.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 5, "high": 5}, "--range = '5-5': must be two ranks, the lower first; write LOW-HIGH"),
        ({"negatives": 0}, "--negatives = 0: must be at least 1"),
        ({"ratio": 1.5}, "--ratio = 1.5: must be above 0 and at most 1"),
        ({"sample": "best"}, "must be min or max, and random or first"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        SelectOptions(**options).check()
