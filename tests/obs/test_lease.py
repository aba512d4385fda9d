"""Two runs in one folder: who is refused, who may take over, and that a run that was overtaken cannot
publish.
"""

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megam3.errors import ConfigError
from megam3.files import write_json
from megam3.obs.lease import Holder, Lease, acquire, describe_self, process_start, read_lease

SELF = describe_self({"SLURM_JOB_ID": "7"})
ELSEWHERE = replace(SELF, host="gpu07", token="elsewhere", job="6")


def write_lease(run_dir: Path, holder: Holder, beat: int = 3) -> None:
    (run_dir / "lease.json").write_text(json.dumps({**vars(holder), "beat": beat}))


def test_a_lease_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    lease = acquire(tmp_path / "run", SELF)
    assert read_lease(lease.path) == (SELF, 0)
    lease.beat()
    lease.check()
    assert read_lease(lease.path) == (SELF, 1)
    lease.release()
    assert not lease.path.exists()
    lease.beat()
    assert not lease.path.exists()


def test_a_second_run_on_this_host_is_refused_at_once_and_told_by_whom(tmp_path: Path) -> None:
    acquire(tmp_path, SELF)
    rule = rf"another run uses this folder: process {os.getpid()} on {SELF.host}, job 7; end that run first"
    with pytest.raises(ConfigError, match=rule):
        acquire(tmp_path, replace(describe_self({}), host=SELF.host), stale_seconds=1e6)


def test_a_holder_that_died_on_this_host_is_followed_at_once(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = process_start(dead.pid)
    assert started
    dead.communicate(b"\n")
    write_lease(tmp_path, replace(SELF, pid=dead.pid, started=started, token="dead"))
    acquire(tmp_path, SELF, stale_seconds=1e6).check()


def test_a_process_id_that_came_round_again_is_another_process(tmp_path: Path) -> None:
    write_lease(tmp_path, replace(SELF, started=SELF.started - 1, token="earlier"))
    acquire(tmp_path, SELF, stale_seconds=1e6).check()


def test_a_holder_elsewhere_lives_as_long_as_its_beat_moves(tmp_path: Path) -> None:
    write_lease(tmp_path, ELSEWHERE)
    ended = threading.Event()

    def move() -> None:
        for beat in itertools.count(4):
            if ended.wait(0.2):
                return
            write_json(tmp_path / "lease.json", {**vars(ELSEWHERE), "beat": beat}, durable=False)

    mover = threading.Thread(target=move)
    mover.start()
    try:
        with pytest.raises(ConfigError, match=r"process \d+ on gpu07, job 6"):
            acquire(tmp_path, SELF, stale_seconds=60)
    finally:
        ended.set()
        mover.join()
    acquire(tmp_path, SELF, stale_seconds=0.2).check()


def test_a_requeued_job_follows_its_first_run_without_waiting(tmp_path: Path) -> None:
    write_lease(tmp_path, replace(ELSEWHERE, job="7"))
    acquire(tmp_path, SELF, stale_seconds=1e6).check()


@pytest.mark.parametrize("content", ["", "null", "[]", "{", '{"host": 1}', "\x00\xff"])
def test_a_file_that_is_no_lease_stops_nobody(tmp_path: Path, content: str) -> None:
    (tmp_path / "lease.json").write_text(content, encoding="latin-1")
    acquire(tmp_path, SELF, stale_seconds=0.1).check()


def test_a_run_that_was_frozen_and_overtaken_may_not_publish_nor_take_the_lease_back(tmp_path: Path) -> None:
    frozen = acquire(tmp_path, SELF)
    write_lease(tmp_path, ELSEWHERE)
    frozen.beat()
    with pytest.raises(ConfigError, match=r"no longer holds it; it belongs to process \d+ on gpu07"):
        frozen.check()
    frozen.release()
    assert read_lease(frozen.path) == (ELSEWHERE, 3)
    frozen.path.unlink()
    with pytest.raises(ConfigError, match=r"lease.json was removed"):
        frozen.check()


def holds(lease: Lease) -> bool:
    try:
        lease.check()
    except ConfigError:
        return False
    return True


def test_of_many_that_take_an_abandoned_lease_at_most_one_holds_it(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("megam3.obs.lease.SETTLE_SECONDS", 0.3)
    write_lease(tmp_path, ELSEWHERE)
    took, refused = [], []

    def contend(number: int) -> None:
        try:
            took.append(
                acquire(tmp_path, replace(SELF, host=f"h{number}", token=str(number)), stale_seconds=0.1)
            )
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=contend, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(took) + len(refused) == 6
    # one that the machine held up between looking and writing comes late and overtakes: the fence tells
    assert len([lease for lease in took if holds(lease)]) == 1


def test_the_beat_moves_by_itself(tmp_path: Path) -> None:
    lease = acquire(tmp_path, SELF)
    lease.keep(seconds=0.02)
    end = time.monotonic() + 60
    while (read_lease(lease.path) or (SELF, 0))[1] < 3:
        assert time.monotonic() < end
        time.sleep(0.02)
    lease.release()
