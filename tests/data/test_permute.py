import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megam3.data.permute import SMALL, draw, key_of, permute

KEYS = st.integers(0, 2**64 - 1)


@given(size=st.one_of(st.integers(1, 300), st.integers(SMALL - 2, 3 * SMALL)), key=KEYS)
@settings(max_examples=60, deadline=None)
def test_is_a_permutation(size, key):
    assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@given(size=st.integers(1, 10**12), key=KEYS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_position_alone_goes_where_it_goes_in_company(size, key, data):
    positions = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    together = permute(positions, size, key)
    assert [
        int(permute(positions[i : i + 1], size, key)[0]) for i in range(len(positions))
    ] == together.tolist()
    assert len(set(together.tolist())) == len(positions)
    assert ((together >= 0) & (together < size)).all()


def in_plain_integers(position: int, size: int, key: int) -> int:
    """Six rounds of xor with a hash of the other half, walked until below `size`; Python's integers know no
    types and no overflow."""
    word, bits = 2**64, (size - 1).bit_length()
    halves = [bits // 2, bits - bits // 2]
    while True:
        low, high = position % 2 ** halves[0], position >> halves[0]
        for number in range(6):
            mixed = (
                ((low if number % 2 == 0 else high) + key + number * 0x9E3779B97F4A7C15)
                % word
                * 0xFF51AFD7ED558CCD
                % word
            )
            mixed = (mixed ^ mixed >> 32) * 0xC4CEB9FE1A85EC53 % word >> 29
            if number % 2 == 0:
                high ^= mixed % 2 ** halves[1]
            else:
                low ^= mixed % 2 ** halves[0]
        position = (high << halves[0]) | low
        if position < size:
            return position


@given(size=st.integers(SMALL + 1, 10**12), key=KEYS, data=st.data())
@settings(max_examples=60, deadline=None)
def test_equals_arithmetic_in_plain_integers(size, key, data):
    positions = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=5))
    assert permute(np.array(positions), size, key).tolist() == [
        in_plain_integers(p, size, key) for p in positions
    ]


@pytest.mark.parametrize("size", [100, SMALL, SMALL + 1, 20_000, 100_000])
def test_no_visible_order(size):
    """Against what a uniform permutation would give, at five standard deviations, over 20 keys."""
    fixed, ascents, correlations = [], [], []
    for seed in range(20):
        image = permute(np.arange(size), size, key_of("order", seed))
        fixed.append(int((image == np.arange(size)).sum()))
        ascents.append(int((np.diff(image) > 0).sum()))
        correlations.append(np.corrcoef(image[:-1], image[1:])[0, 1])
    assert abs(np.mean(fixed) - 1) < 5 / np.sqrt(20)
    assert abs(np.mean(ascents) - (size - 1) / 2) < 5 * np.sqrt((size + 1) / 12 / 20)
    assert abs(np.mean(correlations)) < 5 / np.sqrt(20 * size)


@pytest.mark.parametrize("size", [64, 5000])
def test_destination_of_a_position_is_uniform(size):
    """Chi-square of where position 3 goes over many keys."""
    bins = np.bincount(
        [int(permute(np.array([3]), size, key_of(seed))[0]) * 8 // size for seed in range(4000)], minlength=8
    )
    assert ((bins - 500.0) ** 2 / 500).sum() < 35  # 7 degrees of freedom: one in 100 000


def test_keys_give_unrelated_orders():
    first, second = (permute(np.arange(10_000), 10_000, key_of(5, epoch)) for epoch in (0, 1))
    assert (first == second).sum() < 10
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05


def test_key_tells_parts_and_types_apart():
    assert (
        len({key_of(1, 23), key_of(12, 3), key_of("1", 23), key_of(123), key_of("a", "b"), key_of("ab", "")})
        == 6
    )


def test_draws_are_uniform_and_depend_on_every_column():
    rows = np.arange(8000)
    draws = draw(7, rows, np.zeros(8000, int), np.ones(8000, int))
    assert len(np.unique(draws)) == 8000
    assert ((np.bincount((draws % np.uint64(8)).astype(int), minlength=8) - 1000.0) ** 2 / 1000).sum() < 35
    for column in range(3):
        columns = [np.array([5]), np.array([6]), np.array([7])]
        columns[column] = columns[column] + 1
        assert draw(7, *columns) != draw(7, np.array([5]), np.array([6]), np.array([7]))


def test_same_in_another_process():
    program = (
        "import numpy as np; from megam3.data.permute import *; print(key_of(1, 'a'),"
        " permute(np.arange(9), 10**9, 5).tolist())"
    )
    output = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "77"},
    ).stdout
    assert output.strip() == f"{key_of(1, 'a')} {permute(np.arange(9), 10**9, 5).tolist()}"
