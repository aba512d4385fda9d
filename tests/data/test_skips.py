"""Which place of the plan a step serves once ranges are left out, against a list that is filtered."""

import random

import pytest

from megam3.data.skips import ServedBatches, merge_ranges, place_of


def served_places(skipped, count):
    """The first places that are in no range, one by one."""
    out = {place for first, stop in skipped for place in range(first, stop)}
    return [place for place in range(count + len(out)) if place not in out][:count]


def test_places_are_those_of_a_filtered_list_whatever_the_ranges():
    random.seed(3)
    for _ in range(200):
        skipped = [
            (first, first + random.randint(1, 6))
            for first in random.choices(range(40), k=random.randint(0, 5))
        ]
        merged = merge_ranges(skipped)
        assert [place_of(step, merged) for step in range(50)] == served_places(skipped, 50)
        assert all(stop < first for (_, stop), (first, _) in zip(merged, merged[1:]))


def test_batches_of_accumulated_steps_are_left_out_together():
    numbers = ServedBatches(1, 5, 2, [[2, 4]])
    assert list(numbers) == [2, 3, 8, 9, 10, 11, 12, 13]
    assert len(numbers) == 8
    assert list(ServedBatches(3, 3, 2, [])) == []
    with pytest.raises(IndexError):
        numbers[8]


def test_a_billion_steps_take_no_memory():
    numbers = ServedBatches(0, 10**9, 4, [[10, 20], [10**8, 10**8 + 5]])
    assert numbers[4 * 10**9 - 1] == (10**9 - 1 + 15) * 4 + 3
