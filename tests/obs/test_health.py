"""A run that stands still says which rank, step and phase, and ends; on two real ranks one of which is
stopped.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import pytest

from megam3.dist.env import free_port
from megam3.obs import health as health_module
from megam3.obs.health import EXIT_STALLED, RankStatus, Watchdog, explain

STATUS = RankStatus(rank=0, host="gpu07", pid=11, step=12, phase="update", beat=4)
BEHIND = replace(STATUS, rank=1, host="gpu08", pid=12, phase="data")


def test_a_silent_rank_is_named_with_its_place() -> None:
    said = explain(STATUS, 30.2, {0: STATUS, 1: BEHIND}, [1])
    assert said == (
        "megam3: rank 0: no progress for 30 s in step 13, update: "
        "rank 1 on gpu08 (process 12) is silent since step 13, data"
    )
    assert explain(STATUS, 30, {0: STATUS}, [1]).endswith("rank 1 never reported")


def test_a_rank_that_answers_but_is_behind_is_named() -> None:
    said = explain(STATUS, 30, {0: STATUS, 1: BEHIND, 2: replace(STATUS, rank=2)}, [])
    assert said.endswith("in step 13, update: waiting for rank 1 on gpu08 (process 12) in step 13, data")
    earlier = replace(BEHIND, step=11, phase="update")
    assert "waiting for rank 1 on gpu08 (process 12) in step 12, update" in explain(
        STATUS, 30, {0: STATUS, 1: earlier}, []
    )


def test_all_in_one_place_and_a_store_that_is_gone() -> None:
    others = {rank: replace(STATUS, rank=rank) for rank in range(3)}
    assert "all 3 ranks stand there and can still speak" in explain(STATUS, 30, others, [])
    assert "this process stands there" in explain(STATUS, 30, {0: STATUS}, [])
    assert "rank 0, which serves the ranks' meeting point, does not answer" in explain(STATUS, 30, {}, None)


def test_many_ranks_are_counted_and_not_listed() -> None:
    assert explain(STATUS, 30, {}, list(range(1, 101))).endswith("rank 8 never reported; and 92 more")


class FakeStore(dict):
    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


class Clock:
    """Moves by hand alone: what the machine holds up is no time to a watchdog."""

    def __init__(self) -> None:
        self.now, self.looks = 100.0, Counter[str]()

    def monotonic(self) -> float:
        self.looks[threading.current_thread().name] += 1
        return self.now

    def advance(self, seconds: float, said: list[str]) -> None:
        """Time passes, and both threads of the watchdog take note of it; one that ended the run is done."""
        self.now += seconds
        before = Counter(self.looks)
        end = time.monotonic() + 60
        # they ask once a round: the second question shows that a round is over
        while not said and any(self.looks[name] < before[name] + 2 for name in THREADS):
            assert time.monotonic() < end
            time.sleep(0.005)


THREADS = ("megam3_report", "megam3_watch")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(health_module, "time", made)
    return made


def test_progress_keeps_it_quiet_and_its_end_does_not(clock: Clock) -> None:
    said: list[str] = []
    with Watchdog(0, 1, 0.5, end=said.append) as watchdog:
        for step in range(20):
            watchdog.at(step, "forward")
            clock.advance(0.375, said)
        assert not said
        clock.advance(2.5, said)
    assert "no progress for 3 s in step 20, forward" in said[0]


def test_a_long_evaluation_is_no_stall_but_a_silent_rank_in_it_is(clock: Clock) -> None:
    said: list[str] = []
    store = FakeStore()
    other = replace(BEHIND, phase="evaluate", step=3)
    with Watchdog(0, 2, 0.5, store, end=said.append) as watchdog:
        watchdog.at(3, "evaluate")
        for beat in range(20):
            store.set("1", json.dumps(vars(replace(other, beat=beat))))
            clock.advance(0.0625, said)
        assert not said
        for _ in range(4):
            clock.advance(0.0625, said)
    assert "rank 1 on gpu08 (process 12) is silent since step 4, evaluate" in said[0]


def test_the_phase_after_a_long_evaluation_does_not_inherit_its_age(clock: Clock) -> None:
    said: list[str] = []

    class HeldUp(Watchdog):
        """The machine holds the loop up after whatever `at` does, and lets the threads run."""

        is_held_up = False

        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, value)
            if self.is_held_up and threading.current_thread() is threading.main_thread():
                clock.advance(0.0, said)

    with HeldUp(0, 1, 0.5, end=said.append) as watchdog:
        watchdog.at(3, "evaluate")
        clock.advance(8.0, said)
        assert not said
        watchdog.is_held_up = True
        watchdog.at(3, "forward")
        watchdog.is_held_up = False
    assert not said


# each rank steps through a collective; rank 1 stops itself (as SIGSTOP from outside would) or sticks in its
# data phase
LIMIT_SECONDS = 8.0
RANK = """
import json, os, signal, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from megam3.obs.health import Watchdog, open_store
rank, port, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]
stopped = int(sys.argv[4])
url = f"tcp://127.0.0.1:{port}"
dist.init_process_group("gloo", init_method=url, rank=rank, world_size=2, timeout=timedelta(seconds=120))
store = open_store()
# both ranks' limits end at once, and whose peer has gone may hear of that first: here the other one speaks
end = (lambda message: time.sleep(600)) if rank == stopped else None
dist.barrier()  # both are there before either is watched
with Watchdog(rank, 2, LIMIT, open_store(), end) as watchdog:
    for step in range(1000):
        watchdog.at(step, "data")
        if step == 5 and rank == stopped:
            while not (store.check([str(rank)]) and (told := json.loads(store.get(str(rank))))["step"] == 5):
                time.sleep(0.05)  # until a report of this place is out
            assert told["phase"] == "data"
            if how == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)
        watchdog.at(step, "forward")
        dist.all_reduce(torch.ones(1))
"""


def run_pair(how: str, stopped: int) -> tuple[int, str]:
    """Exit code and words of the rank that was left alone."""
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                RANK.replace("LIMIT", str(LIMIT_SECONDS)),
                str(rank),
                port,
                how,
                str(stopped),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        _, said = ranks[1 - stopped].communicate(timeout=200)
        return ranks[1 - stopped].returncode, said
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


@pytest.mark.ranks
def test_a_stopped_rank_is_named_by_the_other() -> None:
    code, said = run_pair("stop", 1)
    assert code == EXIT_STALLED, said
    head = re.search(r"megam3: rank 0: no progress for (\d+) s in step 6, forward: rank 1 on", said)
    assert head, said
    assert int(head[1]) >= LIMIT_SECONDS
    assert "is silent since step 6, data" in said
    assert "all_reduce" in said  # the stacks


@pytest.mark.ranks
def test_a_stopped_rank_0_takes_the_store_with_it_and_is_named_all_the_same() -> None:
    code, said = run_pair("stop", 0)
    assert code == EXIT_STALLED, said
    assert "rank 1: no progress" in said
    assert "rank 0, which serves the ranks' meeting point, does not answer" in said


@pytest.mark.ranks
def test_a_rank_that_waits_for_its_data_is_named_by_the_other() -> None:
    code, said = run_pair("data", 1)
    assert code == EXIT_STALLED, said
    assert "in step 6, forward: waiting for rank 1 on" in said
    assert "in step 6, data" in said
