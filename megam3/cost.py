"""Sharing the work of one step: rows over ranks, texts over chunks, by what attention costs.

cost(L) = L · (1 + L / L0):   a layer costs 24·h² FLOPs a token for its matrices and 4·h·L for attention,
                              equal at L0 = 6·h
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

ATTENTION_EQUALS_MATRICES_TOKENS = 6 * 1024
"""L0 for a hidden width of 1024; narrower models weigh attention more, but shares move by a few per cent."""


def text_cost(lengths: np.ndarray) -> np.ndarray:
    """Relative cost of encoding texts of these many tokens, float64."""
    lengths = np.asarray(lengths, dtype=np.float64)
    return lengths * (1.0 + lengths / ATTENTION_EQUALS_MATRICES_TOKENS)


def assign_ranks(costs: np.ndarray, world_size: int) -> list[np.ndarray]:
    """Indices of `costs` for each rank, ascending.

    Dealt the largest first, each to the rank with the least so far (Graham 1969, LPT).

    Every rank gets at least one index if there are enough.

    Raises:
        ValueError: fewer costs than ranks.
    """
    if len(costs) < world_size:
        raise ValueError(f"{len(costs)} queries cannot be shared by {world_size} ranks")
    if world_size == 1:
        return [np.arange(len(costs))]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    # the number already given breaks ties, so that rows of cost zero cannot starve a rank
    # a heap of (load, rows given, rank): the least loaded rank is on top
    loads = [(0.0, 0, rank) for rank in range(world_size)]
    for index in np.argsort(-costs, kind="stable").tolist():
        load, given, rank = heapq.heappop(loads)
        shares[rank].append(index)
        heapq.heappush(loads, (load + float(costs[index]), given + 1, rank))
    return [np.sort(np.asarray(share, dtype=np.int64)) for share in shares]


def plan_chunks(lengths: Sequence[int], chunk_tokens: int) -> list[tuple[int, int]]:
    """Cut texts, in order, into the fewest spans of at most `chunk_tokens`, as even in cost as that allows.

    A text longer than `chunk_tokens` is a span of its own. Returns (start, stop) pairs.
    """
    if not lengths:
        return []
    costs = text_cost(np.asarray(lengths))
    # filling each span to the brim gives the fewest: every span is a forward pass and, under ZeRO-3, a gather
    # of all weights, so evenness must never cost one more
    fewest = _cut(lengths, costs, chunk_tokens, np.inf)
    # bisect on the cost of the dearest span: no span can be cheaper than the dearest text, nor need one be
    # dearer than those of the greedy cut
    low, high = float(costs.max()), max(float(costs[a:b].sum()) for a, b in fewest)
    best = fewest
    for _ in range(20):  # to a millionth of the range, in about a millisecond for a thousand texts
        middle = (low + high) / 2
        spans = _cut(lengths, costs, chunk_tokens, middle)
        if len(spans) <= len(fewest):
            best, high = spans, middle
        else:
            low = middle
    return best


def _cut(
    lengths: Sequence[int], costs: np.ndarray, max_tokens: int, max_cost: float
) -> list[tuple[int, int]]:
    spans, start, tokens, cost = [], 0, 0, 0.0
    for index, (length, price) in enumerate(zip(lengths, costs.tolist())):
        if index > start and (tokens + length > max_tokens or cost + price > max_cost):
            spans.append((start, index))
            start, tokens, cost = index, 0, 0.0
        tokens, cost = tokens + length, cost + price
    return [*spans, (start, len(lengths))]
