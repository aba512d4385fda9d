"""One rank on each of two hosts that share nothing but a link and a file system; the link is cut, delayed and
lossy in mid-run."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from megam3.dist.env import free_port
from megam3.obs.health import EXIT_STALLED
from tests.hosts_apart import Hosts, missing_for_hosts, two_hosts
from tests.launches import HELD, ROOT, Workplace, make_workplace

STEPS = 30
LIMIT_SECONDS = 15
MISSING = missing_for_hosts()
pytestmark = [pytest.mark.ranks, pytest.mark.skipif(bool(MISSING), reason=MISSING or "hosts can be made")]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with two_hosts() as made:
        yield made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, hosts: Hosts) -> Workplace:
    """With the run `whole`, over a link that nothing happened to."""
    made = make_workplace(tmp_path_factory.mktemp("apart"))
    assert finish(start(hosts, made, "whole")) == [0, 0], said(made)
    return made


def start(hosts: Hosts, place: Workplace, name: str, **held: str) -> list[subprocess.Popen]:
    """A rank on each host, with what a launcher on it would set; `held` is what the program HELD reads."""
    port, ranks = str(free_port()), []
    program = ["-c", HELD] if held else ["-m", "megam3.train"]
    for rank in range(2):
        environ = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": hosts.addresses[0],
            "MASTER_PORT": port,
            # gloo takes the address that the host's name leads to, which is the same name on both here
            "GLOO_SOCKET_IFNAME": "eth0",
            **held,
        }
        arguments = [place.recipe, f"name={name}", f"train.steps={STEPS}", "train.save_every_steps=5"]
        arguments += [f"train.timeout_seconds={LIMIT_SECONDS}", "engine.template=zero2"]
        with (place.folder / f"log{rank}").open("w") as log:
            ranks.append(
                subprocess.Popen(
                    hosts.command(rank, sys.executable, "-u", *program, *arguments),
                    env=environ,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
    return ranks


def finish(ranks: Sequence[subprocess.Popen], seconds: float = 300) -> list[int]:
    try:
        return [rank.wait(seconds) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def said(place: Workplace) -> list[str]:
    return [(place.folder / f"log{rank}").read_text() for rank in range(2)]


def wait_for_step(place: Workplace, name: str, step: int) -> None:
    end = time.monotonic() + 300
    while not (place.run(name) / "metrics.jsonl").exists() or len(place.rows(name)) < step:
        assert time.monotonic() < end, said(place)
        time.sleep(0.02)


def wait_for_file(path: Path) -> None:
    """Until it is there; the run may be anywhere behind."""
    end = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.01)


def test_a_slow_and_lossy_link_costs_time_only(hosts: Hosts, place: Workplace) -> None:
    ranks = start(hosts, place, "slow")
    try:
        wait_for_step(place, "slow", 5)
        hosts.link.delay_seconds = 0.05
        wait_for_step(place, "slow", 8)
        hosts.link.delay_seconds, hosts.link.loss = 0.0, 0.05
        wait_for_step(place, "slow", 14)
        hosts.link.loss = 0.0
        assert finish(ranks) == [0, 0], said(place)
    finally:
        hosts.link.delay_seconds, hosts.link.loss = 0.0, 0.0
        finish(ranks, 1)
    assert place.figures("slow") == place.figures("whole")


def test_a_cut_link_ends_both_hosts_in_time_and_the_run_goes_on_later(hosts: Hosts, place: Workplace) -> None:
    hold = place.folder / "hold"
    hold.touch()
    # written beside the training, step 10 has its name by the save of step 15 at the latest
    ranks = start(hosts, place, "cut", HELD_AT="16", HELD_WHILE=str(hold))
    try:
        wait_for_file(place.run("cut") / "checkpoints" / "step-000010" / "COMPLETE")
        hosts.link.is_cut = True
        hold.unlink()
        # nobody closes a connection: the watchdogs alone can tell
        assert finish(ranks) == [EXIT_STALLED, EXIT_STALLED], said(place)
    finally:
        hosts.link.is_cut = False
    first, second = said(place)
    place_in_run = r"no progress for \d+ s in step (\d+), (data|forward|update|log|save)"
    found = re.search(
        rf"megam3: rank 0: {place_in_run}: rank 1 on \S+ \(process \d+\) is silent since", first
    )
    assert found, first
    assert int(found.group(1)) > 10
    assert re.search(rf"megam3: rank 1: {place_in_run}: rank 0, which serves the ranks' meeting", second), (
        second
    )
    assert finish(start(hosts, place, "cut")) == [0, 0], said(place)
    assert re.search(r"starting at step (10|15|20|25)\b", said(place)[0]), said(place)[0]
    assert place.figures("cut") == place.figures("whole")
