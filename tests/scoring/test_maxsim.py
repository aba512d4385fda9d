import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megam3.scoring.maxsim import maxsim_scores
from tests.representations import make_offsets, naive_maxsim, random_representations


def _check(queries, passages, reduction, chunk):
    scores = maxsim_scores(
        queries.multi_KC,
        queries.multi_offsets_N1,
        passages.multi_KC,
        passages.multi_offsets_N1,
        reduction,
        chunk,
    )
    reference = naive_maxsim(queries, passages, reduction)
    with torch.no_grad():  # keeps no winners: another way through
        args = (
            queries.multi_KC,
            queries.multi_offsets_N1,
            passages.multi_KC,
            passages.multi_offsets_N1,
            reduction,
            chunk,
        )
        torch.testing.assert_close(maxsim_scores(*args), reference, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scores, reference, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1), dtype=scores.dtype)
    leaves = [queries.multi_KC, passages.multi_KC]
    for ours, theirs in zip(
        torch.autograd.grad(scores, leaves, upstream), torch.autograd.grad(reference, leaves, upstream)
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 7),
    st.integers(0, 10**6),
    st.sampled_from(["mean", "sum"]),
    st.sampled_from([1, 7, 40, None]),
)
def test_equals_the_padded_reference_on_ragged_texts(num_queries, num_passages, seed, reduction, chunk):
    _check(
        random_representations(num_queries, seed),
        random_representations(num_passages, seed + 1),
        reduction,
        chunk,
    )


def test_padding_cannot_win_the_maximum():
    # the only row of the passage is opposite to the query: a padded zero row would lift the score from -1 to
    # 0
    row = torch.tensor([[1.0, 0.0]])
    one, longer = make_offsets([1]), make_offsets([1, 3])
    scores = maxsim_scores(row, one, torch.cat([-row, row, row, row]), longer)
    assert scores.tolist() == [[-1.0, 1.0]]


def test_texts_without_rows_score_zero_and_get_no_gradient():
    query = torch.randn(2, 4, requires_grad=True)
    scores = maxsim_scores(
        query, make_offsets([0, 2, 0]), torch.zeros(0, 4, requires_grad=True), make_offsets([0, 0])
    )
    assert scores.tolist() == [[0.0, 0.0]] * 3
    scores.sum().backward()
    assert query.grad is not None
    assert not query.grad.any()


def test_no_queries_still_gives_a_graph():
    passage = torch.randn(3, 4, requires_grad=True)
    scores = maxsim_scores(
        torch.zeros(0, 4, requires_grad=True), make_offsets([]), passage, make_offsets([1, 2])
    )
    assert scores.shape == (0, 2)
    scores.sum().backward()
    assert not passage.grad.any()


def test_low_precision_accumulates_in_fp32():
    queries, passages = random_representations(4, 3), random_representations(5, 4)
    low = [x.multi_KC.detach().bfloat16().requires_grad_() for x in (queries, passages)]
    scores = maxsim_scores(low[0], queries.multi_offsets_N1, low[1], passages.multi_offsets_N1)
    wide = [x.detach().float().requires_grad_() for x in low]
    reference = maxsim_scores(wide[0], queries.multi_offsets_N1, wide[1], passages.multi_offsets_N1)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, reference)
    for ours, theirs in zip(
        torch.autograd.grad(scores.sum(), low), torch.autograd.grad(reference.sum(), wide)
    ):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs.bfloat16())


class _LargestFloat(TorchDispatchMode):
    """Most entries of any fp32 tensor that was made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if (
                isinstance(tensor, torch.Tensor)
                and tensor.dtype == torch.float32
                and tensor.layout == torch.strided
            ):
                self.entries = max(self.entries, tensor.numel())
        return result


def test_backward_widens_low_precision_rows_in_blocks_only():
    generator = torch.Generator().manual_seed(3)
    offsets, width, chunk = make_offsets([8] * 64), 32, 1024
    rows = [
        torch.nn.functional.normalize(torch.randn(512, width, generator=generator), dim=1).bfloat16()
        for _ in range(2)
    ]
    low, wide = [x.clone().requires_grad_() for x in rows], [x.double().requires_grad_() for x in rows]
    scores = maxsim_scores(low[0], offsets, low[1], offsets, "mean", chunk)
    upstream = torch.randn(scores.shape, generator=generator)
    with _LargestFloat() as largest:
        scores.backward(upstream)
    assert largest.entries <= 4 * chunk < 512 * width
    reference = torch.autograd.grad(
        maxsim_scores(wide[0], offsets, wide[1], offsets), wide, upstream.double()
    )
    for ours, theirs in zip(low, reference):
        torch.testing.assert_close(ours.grad, theirs.bfloat16())


@pytest.mark.parametrize("chunk", [1, 64, 1 << 20])
def test_chunk_size_does_not_change_the_numbers(chunk):
    queries, passages = (
        random_representations(6, 5, dtype=torch.float32),
        random_representations(9, 6, dtype=torch.float32),
    )
    whole = naive_maxsim(queries, passages)
    scores = maxsim_scores(
        queries.multi_KC,
        queries.multi_offsets_N1,
        passages.multi_KC,
        passages.multi_offsets_N1,
        "mean",
        chunk,
    )
    torch.testing.assert_close(scores, whole)
