import os
import signal
import threading
import time

import pytest

from megam3.data.loader import Loader
from megam3.data.process import Worker, WorkerError
from megam3.errors import DataError
from tests.data.toy_worker import make_handler


def load(numbers=range(12), num_workers=2, prefetch=3, **setup) -> Loader:
    return Loader(make_handler, setup, numbers, num_workers, prefetch, pin=False)


def rows_of(loader) -> list[int]:
    rows = [int(batch.rows_Q[0]) for batch in loader]
    loader.close()
    return rows


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize("prefetch", [1, 4])
def test_batches_in_order(num_workers, prefetch):
    assert rows_of(load(range(3, 20), num_workers, prefetch)) == list(range(3, 20))


def test_no_batches():
    assert rows_of(load(range(0))) == []


def test_stray_prints_do_no_harm():
    assert rows_of(load(fail="print", at=2)) == list(range(12))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_user_error_comes_back_as_itself(num_workers):
    loader, seen = load(num_workers=num_workers, fail="user", at=5), []
    with pytest.raises(DataError, match="row = 5: is broken; mend it"):
        seen.extend(int(batch.rows_Q[0]) for batch in loader)
    assert seen == [0, 1, 2, 3, 4]
    loader.close()


def test_error_in_the_workers_setup():
    loader = load(fail="setup")
    with pytest.raises(DataError, match="is broken"):
        next(iter(loader))
    loader.close()


def test_bug_comes_back_with_its_traceback():
    loader = load(fail="bug", at=5)
    with pytest.raises(
        WorkerError,
        match=r"(?s)worker tests.data.toy_worker \(pid \d+\) failed:.*in handle.*ZeroDivisionError: at 5",
    ):
        list(loader)
    loader.close()


def test_worker_that_ends_is_an_error():
    loader = load(fail="exit", at=5)
    with pytest.raises(WorkerError, match="ended with exit code 7 before it answered"):
        list(loader)
    loader.close()


def test_killed_worker_is_an_error_and_no_hang():
    loader = load(range(10**6))
    batches = iter(loader)
    next(batches)
    os.kill(loader.worker_pids[1], signal.SIGKILL)
    with pytest.raises(
        WorkerError,
        match=r"was killed by SIGKILL before it answered; the kernel kills processes this way"
        r" when memory runs out",
    ):
        list(batches)
    loader.close()


def test_close_in_the_middle_leaves_nothing_running():
    before = set(threading.enumerate())
    loader = load(range(10**6))
    next(iter(loader))
    pids = loader.worker_pids
    loader.close()
    # threads of other tests may end meanwhile: only new ones count
    assert set(threading.enumerate()) <= before
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_prefetch_is_bounded():
    loader = load(range(10**6), num_workers=1, prefetch=3)
    next(iter(loader))
    time.sleep(0.5)
    assert loader._ready.qsize() <= 3
    loader.close()


def test_worker_ends_when_its_parent_is_gone():
    worker = Worker(make_handler, {})
    worker.send(1)
    worker.receive()
    worker._process.stdin.close()
    assert worker._process.wait(timeout=60) == 0
    worker._process.stdout.close()
