"""The Triton kernel under Triton's interpreter, against torch and a float64 loop. `test_maxsim_triton.py`
runs this file in a process of its own, because triton decides for its interpreter when it is imported.

The interpreter multiplies the bit patterns of bf16 numbers; fp16 and fp32 take the same lines of the kernel.
"""

import pytest
import torch

from megam3.scoring.maxsim import maxsim_scores
from megam3.scoring.maxsim_triton import BLOCK, COLUMNS, ENTRIES, ROWS, WIDTH, best_rows, sum_rows
from tests.representations import make_offsets, naive_maxsim, random_representations

RAGGED = [1, BLOCK + 2, 7, 2 * BLOCK + 44, BLOCK, 1]
"""One row, exact blocks, and blocks with a rest."""


def _unit_rows(count, width, seed, dtype):
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_rows", "width"), [(ROWS + 6, WIDTH + 36), (3, 5), (ROWS, WIDTH)])
def test_winners_equal_a_float64_loop(dtype, num_rows, width):
    offsets = make_offsets(RAGGED)
    query_KC, passage_KC = (
        _unit_rows(num_rows, width, 0, dtype),
        _unit_rows(int(offsets[-1]), width, 1, dtype),
    )
    best_KP, winner_KP = best_rows(query_KC, passage_KC, offsets, True)
    spans = offsets.tolist()
    for passage, (start, stop) in enumerate(zip(spans, spans[1:])):
        highest, index = (query_KC.double() @ passage_KC[start:stop].double().T).max(1)
        torch.testing.assert_close(best_KP[:, passage].double(), highest, rtol=1e-6, atol=1e-6)
        assert torch.equal(winner_KP[:, passage].long(), index + start)
    assert best_KP.dtype == torch.float32
    again, none = best_rows(query_KC, passage_KC, offsets, False)
    assert torch.equal(again, best_KP)
    assert none is None


def test_of_equal_rows_the_first_wins_and_nothing_outside_a_passage_can():
    row = torch.tensor([[1.0, 0.0]])
    best_KP, winner_KP = best_rows(row, torch.cat([-row, row, row, row, row]), make_offsets([1, 2, 2]), True)
    assert best_KP.tolist() == [[-1.0, 1.0, 1.0]]
    assert winner_KP.tolist() == [[0, 1, 3]]


@pytest.mark.parametrize("place", [0, BLOCK])
def test_a_broken_row_gives_a_score_that_is_not_finite(place):
    passage_KC = _unit_rows(BLOCK + 1, 4, 2, torch.float32)
    passage_KC[place, 1] = float("nan")
    best_KP, winner_KP = best_rows(
        _unit_rows(2, 4, 3, torch.float32), passage_KC, make_offsets([BLOCK + 1]), True
    )
    assert not best_KP.isfinite().any()
    assert winner_KP.tolist() == [[place]] * 2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("chunk", [8, None])
@pytest.mark.parametrize("seed", range(4))
def test_scores_and_gradients_equal_the_torch_path_and_the_padded_reference(reduction, chunk, seed):
    wide = [
        random_representations(5, seed, dtype=torch.float32),
        random_representations(7, seed + 1, dtype=torch.float32),
    ]
    exact = [random_representations(5, seed), random_representations(7, seed + 1)]

    def score(use_kernel):
        sides = [x for side in wide for x in (side.multi_KC, side.multi_offsets_N1)]
        return maxsim_scores(*sides, reduction, chunk, use_kernel)

    kernel, plain, reference = score(True), score(False), naive_maxsim(*exact, reduction)
    torch.testing.assert_close(kernel, plain)
    torch.testing.assert_close(kernel, reference.float())
    with torch.no_grad():
        torch.testing.assert_close(score(True), plain)
    upstream = torch.randn(kernel.shape, generator=torch.Generator().manual_seed(seed))
    leaves, exact_leaves = [side.multi_KC for side in wide], [side.multi_KC for side in exact]
    gradients = [torch.autograd.grad(scores, leaves, upstream) for scores in (kernel, plain)]
    for ours, torchs, theirs in zip(
        *gradients, torch.autograd.grad(reference, exact_leaves, upstream.double())
    ):
        torch.testing.assert_close(ours, torchs)
        torch.testing.assert_close(ours, theirs.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [5, COLUMNS, COLUMNS + 3])
def test_sums_of_rows_equal_a_float64_product(dtype, width):
    """Rows without entries, with one, with a whole tile of them and with a rest."""
    counts = [0, 1, ENTRIES, 2 * ENTRIES + 3, 0]
    generator = torch.Generator().manual_seed(0)
    crow = make_offsets(counts).to(torch.int32)
    columns = torch.randint(0, 9, (sum(counts),), generator=generator, dtype=torch.int32)
    values = torch.randn(sum(counts), generator=generator)
    dense_XC = _unit_rows(9, width, 1, dtype)
    weights = torch.zeros(len(counts), 9, dtype=torch.float64)
    for row, (start, stop) in enumerate(zip(crow.tolist(), crow.tolist()[1:])):
        for entry in range(start, stop):
            weights[row, columns[entry]] += values[entry].double()
    result = sum_rows(crow, columns, values, dense_XC)
    assert result.dtype == dtype
    torch.testing.assert_close(result, (weights @ dense_XC.double()).to(dtype))
    assert not result[[0, 4]].any()
