import pytest
from hypothesis import given
from hypothesis import strategies as st

from megam3.data.strata import Placed, build_cells, build_strata, place_rows
from tests.data.test_plan import config_of, make_rows

CELLS = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 40)), min_size=1, max_size=9)


@given(CELLS)
def test_every_row_has_a_batch_and_no_batch_is_too_large(cells):
    rows, queries = [own for own, _ in cells], [size for _, size in cells]
    placed = place_rows(rows, queries, may_be_small=True)
    carried = 0
    for own, size, cell in zip(rows, queries, placed):
        tails = cell.tails
        carried += own - cell.num_full * size - sum(tails)
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
    assert all(not cell.tails for cell in placed[:-1])
    assert len(placed[-1].tails) <= 2
    assert all(tail >= queries[-1] // 2 for tail in placed[-1].tails)


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
    found = place_rows(rows, queries)
    assert found == (placed and [Placed(*cell) for cell in placed])


def test_the_trace_of_the_docstring():
    de, sw = 0, 1
    first = [(de, 120)] * 4 + [(de, 480)] * 3 + [(sw, 300)] * 2
    second = [(de, 90)] * 2 + [(de, 900)] * 4
    datasets = [make_rows([first, second])]
    table = [{"max_tokens": edge, "global_queries": 3} for edge in (500, 1000)]
    config = config_of({"buckets": table}, homogeneous_by="dataset")
    strata = build_strata(config, datasets)
    assert [(s.language, s.bucket, s.first_rows.tolist(), s.ends.tolist()) for s in strata] == [
        ("de", 0, [0, 9], [7, 9]),
        ("de", 1, [11], [4]),
        ("sw", 0, [7], [2]),
    ]
    short, long = build_cells(config, datasets, strata)
    assert (short.max_tokens, short.size, short.num_full, short.tails) == (500, 11, 3, ())
    assert (long.max_tokens, long.size, long.carried.count, long.num_full, long.tails) == (1000, 6, 2, 2, ())
