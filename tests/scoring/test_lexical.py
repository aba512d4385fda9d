import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megam3.scoring.lexical import BLOCK_ELEMENTS, lexical_scores
from tests.representations import make_offsets, naive_lexical, random_representations


def _pairs(texts):
    return texts.lexical_weights_Z, texts.lexical_ids_Z, texts.lexical_offsets_N1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 6), st.integers(0, 7), st.integers(0, 10**6), st.sampled_from([1, 9, 40, BLOCK_ELEMENTS])
)
def test_equals_vocabulary_sized_vectors_on_ragged_texts(num_queries, num_passages, seed, block):
    queries, passages = (
        random_representations(num_queries, seed),
        random_representations(num_passages, seed + 1),
    )
    scores, reference = (
        lexical_scores(*_pairs(queries), *_pairs(passages), block),
        naive_lexical(queries, passages),
    )
    torch.testing.assert_close(scores, reference, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(2), dtype=scores.dtype)
    leaves = [queries.lexical_weights_Z, passages.lexical_weights_Z]
    theirs = torch.autograd.grad(reference, leaves, upstream, allow_unused=True)
    for leaf, ours, their in zip(leaves, torch.autograd.grad(scores, leaves, upstream), theirs):
        torch.testing.assert_close(
            ours, torch.zeros_like(leaf) if their is None else their, rtol=1e-12, atol=1e-12
        )


def test_huge_ids_cost_nothing():
    ids = torch.tensor([5, 2**40])
    weights = torch.tensor([0.5, 2.0], requires_grad=True)
    scores = lexical_scores(weights, ids, make_offsets([2]), weights, ids, make_offsets([1, 1]))
    assert scores.tolist() == [[0.25, 4.0]]


def test_low_precision_accumulates_in_fp32():
    queries, passages = random_representations(4, 3), random_representations(5, 4)
    low = [x.lexical_weights_Z.detach().bfloat16().requires_grad_() for x in (queries, passages)]
    scores = lexical_scores(low[0], *_pairs(queries)[1:], low[1], *_pairs(passages)[1:])
    wide = [x.detach().float().requires_grad_() for x in low]
    reference = lexical_scores(wide[0], *_pairs(queries)[1:], wide[1], *_pairs(passages)[1:])
    assert scores.dtype == torch.float32
    assert torch.equal(scores, reference)
    for ours, theirs in zip(
        torch.autograd.grad(scores.sum(), low), torch.autograd.grad(reference.sum(), wide)
    ):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs.bfloat16())
