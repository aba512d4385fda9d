import pytest
from hypothesis import given
from hypothesis import strategies as st

from megam3.data.strata import place_rows

CELLS = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), min_size=1, max_size=9)


@given(CELLS)
def test_every_row_has_a_batch_and_no_batch_is_too_large(cells):
    rows, queries = [own for own, _ in cells], [size for _, size in cells]
    placed = place_rows(rows, queries, may_be_small=True)
    carried = 0
    for own, size, (full, tails) in zip(rows, queries, placed):
        carried += own - full * size - sum(tails)
        assert carried >= 0
        assert all(0 < tail <= size for tail in tails)
    assert carried == 0


@given(CELLS)
def test_short_batches_are_few_and_fill_half(cells):
    rows, queries = [own for own, _ in cells], [size for _, size in cells]
    placed = place_rows(rows, queries)
    if placed is None:
        # too few rows to fill half a batch with everything there is
        assert 0 < sum(rows) < queries[-1] / 2 or all(own < size for own, size in cells)
        return
    assert all(not tails for _, tails in placed[:-1])
    assert len(placed[-1][1]) <= 2
    assert all(tail >= queries[-1] // 2 for tail in placed[-1][1])


@pytest.mark.parametrize(
    ("rows", "queries", "placed"),
    [
        ([8], [4], [(2, ())]),
        ([7], [4], [(1, (3,))]),
        ([9], [4], [(1, (3, 2))]),
        ([7, 4], [3, 3], [(2, ()), (1, (2,))]),
        ([8, 1], [8, 4], [(0, ()), (1, (3, 2))]),  # the long cell borrows a batch of short rows
        ([1], [4], None),
    ],
)
def test_worked_examples(rows, queries, placed):
    assert place_rows(rows, queries) == placed
