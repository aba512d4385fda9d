import pytest
import torch

from megam3.batch import join_representations
from megam3.config.weights import HEADS, HeadWeights
from megam3.dist import comm
from megam3.scoring import combine
from megam3.scoring.combine import count_over_ranks, score_global, score_heads
from tests.ranks import run_ranks
from tests.representations import naive_scores, random_representations

WEIGHTS = HeadWeights(dense=1.0, lexical=0.3, multi_vector=0.7)
NUM_QUERIES = (3, 1, 0, 2)
NUM_PASSAGES = (4, 0, 2, 5)
CASES = [(HEADS, WEIGHTS), *(((head,), None) for head in HEADS)]


def _texts(rank):
    return random_representations(NUM_QUERIES[rank], 10 + rank), random_representations(
        NUM_PASSAGES[rank], 20 + rank
    )


def _upstream(num_queries, num_passages, seed):
    return torch.randn(
        num_queries, num_passages, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def _leaves(queries, passages):
    return [*queries.floats(), *passages.floats()]


def _grads(total, leaves):
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)]


def _numbers_received(rank, world):
    """How many numbers reach this rank in one scoring of all heads, besides counts and offsets."""
    received = []

    def counting(function):
        def wrapped(*args):
            result = function(*args)
            received.append(result.numel())
            return result

        return wrapped

    original = combine.gather_rows, combine.exchange_columns
    combine.gather_rows, combine.exchange_columns = map(counting, original)
    try:
        score_global(*_texts(rank), WEIGHTS)
    finally:
        combine.gather_rows, combine.exchange_columns = original
    return sum(received)


def _score_on_a_rank():
    """Scores of this rank, and gradients of the sum over ALL ranks of ⟨scores, upstream⟩ to this rank's
    leaves, per case."""
    rank, world = comm.rank(), comm.world_size()
    results = []
    for heads, weights in CASES:
        queries, passages = _texts(rank)
        scores = score_global(queries, passages, weights, heads=heads).by_name()
        upstream = _upstream(sum(NUM_QUERIES[:world]), sum(NUM_PASSAGES[:world]), 5)
        first = sum(NUM_QUERIES[:rank])
        own = upstream[first : first + NUM_QUERIES[rank]]
        total = sum((own * (index + 1) * matrix).sum() for index, matrix in enumerate(scores.values()))
        results.append(
            [
                {name: matrix.detach() for name, matrix in scores.items()},
                _grads(total, _leaves(queries, passages)),
            ]
        )
    counts = count_over_ranks(*_texts(rank))
    return [
        results,
        list(counts.queries),
        list(counts.passages),
        counts.first_passage,
        _numbers_received(rank, world),
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_score_what_one_rank_scores(world):
    outcomes = run_ranks(_score_on_a_rank, world)
    for case, (heads, weights) in enumerate(CASES):
        parts = [_texts(rank) for rank in range(world)]
        queries, passages = (join_representations(side) for side in zip(*parts))
        expected = score_heads(queries, passages, weights, heads=heads).by_name()
        upstream = _upstream(queries.num_texts, passages.num_texts, 5)
        total = sum((upstream * (index + 1) * matrix).sum() for index, matrix in enumerate(expected.values()))
        first = 0
        for rank in range(world):
            scores, grads = outcomes[rank][0][case]
            assert list(scores) == list(expected)
            for name, matrix in scores.items():
                torch.testing.assert_close(
                    matrix, expected[name].detach()[first : first + NUM_QUERIES[rank]], rtol=1e-12, atol=1e-12
                )
            for ours, theirs in zip(grads, _grads_of(total, parts[rank])):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            first += NUM_QUERIES[rank]
    for rank in range(world):
        assert outcomes[rank][1:4] == [
            list(NUM_QUERIES[:world]),
            list(NUM_PASSAGES[:world]),
            sum(NUM_PASSAGES[:rank]),
        ]
        # dense passage vectors, the queries' pairs (id and weight) and rows and how many of each, two heads'
        # score columns: nothing per passage token
        of_queries = 2 * (queries.lexical_ids_Z.numel() + queries.num_texts) + queries.multi_KC.numel()
        assert (
            outcomes[rank][4]
            == passages.dense_ND.numel() + of_queries + 2 * NUM_QUERIES[rank] * passages.num_texts
        )


def _grads_of(total, sides):
    leaves = _leaves(*sides)
    grads = torch.autograd.grad(total, leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)]


def test_equals_the_naive_scores():
    queries, passages = random_representations(5, 1), random_representations(7, 2)
    expected = naive_scores(queries, passages, (WEIGHTS.dense, WEIGHTS.lexical, WEIGHTS.multi_vector))
    for scores in (score_heads(queries, passages, WEIGHTS), score_global(queries, passages, WEIGHTS)):
        for name, matrix in scores.by_name().items():
            torch.testing.assert_close(matrix, expected[name], rtol=1e-12, atol=1e-12)


def test_a_sum_without_one_of_its_heads_is_refused():
    texts = random_representations(2, 1)
    with pytest.raises(AssertionError, match="gives weight to heads that were not scored: \\['lexical'\\]"):
        score_heads(texts, texts, WEIGHTS, heads=("dense", "multi_vector"))


def test_one_rank_sends_nothing(monkeypatch):
    for name in ("all_gather_into_tensor", "all_to_all_single", "all_reduce", "broadcast", "barrier"):
        monkeypatch.setattr(
            torch.distributed, name, lambda *a, **k: pytest.fail("a single rank communicated")
        )
    texts = random_representations(3, 1)
    sum(x.sum() for x in score_global(texts, texts, WEIGHTS).by_name().values()).backward()
    count_over_ranks(texts, texts)
