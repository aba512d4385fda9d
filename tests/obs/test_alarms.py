import math
import random

import pytest

from megam3.obs.alarms import SpikeAlarm, StragglerWatch, find_stragglers, relative_times


def test_times_are_relative_to_the_fastest_rank() -> None:
    assert relative_times([3.0, 1.5, 1.5]) == [2.0, 1.0, 1.0]
    assert relative_times([0.0, 0.0]) == [1.0, 1.0]


def test_the_slow_rank_is_named_with_its_part_and_the_worst_comes_first() -> None:
    times = {"data": [0.01, 0.40, 0.01], "forward": [1.0, 1.05, 2.0]}
    assert [str(each) for each in find_stragglers(times, step_seconds=2.5)] == [
        "rank 2: forward 2.00 x the fastest rank (2.000 s a step)",
        "rank 1: data 40.00 x the fastest rank (0.400 s a step)",
    ]


def test_a_difference_that_costs_nothing_is_not_reported() -> None:
    assert find_stragglers({"data": [0.001, 0.02]}, step_seconds=2.0) == []
    assert find_stragglers({"forward": [1.0, 1.29]}, step_seconds=1.3) == []


def test_a_watch_speaks_of_means_over_a_window_that_is_long_enough() -> None:
    clock = iter([0.0, 10.0, 40.0, 40.0, 41.0])
    watch = StragglerWatch(min_seconds=30.0, now=lambda: next(clock))
    watch.add({"data": [0.0, 0.1]})
    assert watch.read() == []  # after 10 s
    watch.add({"data": [2.0, 8.1]})
    assert [str(each) for each in watch.read()] == ["rank 1: data 4.10 x the fastest rank (4.100 s a step)"]
    # a new window, which has just begun
    watch.add({"data": [0.0, 9.0]})
    assert watch.read() == []


def test_a_watch_without_steps_says_nothing() -> None:
    clock = iter([0.0, 100.0])
    assert StragglerWatch(now=lambda: next(clock)).read() == []


@pytest.mark.parametrize("seed", range(5))
def test_noise_is_no_spike_and_a_jump_is_one_each_time(seed: int) -> None:
    draw, alarm = random.Random(seed), SpikeAlarm()
    falling = [3.0 - step / 200 + draw.gauss(0, 0.05) for step in range(200)]
    assert [alarm.check(loss) for loss in falling] == [None] * 200
    said = alarm.check(6.0)
    assert said
    assert said.startswith("loss 6, where the last 50 had a median of 2.")
    assert alarm.check(6.1)
    assert alarm.check(falling[-1]) is None


def test_a_constant_loss_and_a_short_history_raise_no_alarm() -> None:
    alarm = SpikeAlarm()
    assert [alarm.check(value) for value in [1.0, 50.0, *[2.0] * 40, 2.1]] == [None] * 43
    assert alarm.check(math.nan) is None
    assert alarm.check(3.0) is not None
