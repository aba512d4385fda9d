"""Everything that a cluster does to a job, one after another to one run: it ends with the figures of a run
that nothing happened to.

    MEGAM3_LONG=1 python -m pytest -s tests/slurm/test_chain.py

does all of it in five minutes: three requeues by signal, a rank killed, a node dead, the job killed and
submitted again. Without the variable a node dies and the job is submitted again; test_real_runs.py has
requeues and the rank.
"""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launches import ROOT, Workplace, make_workplace
from tests.slurm_cluster import Cluster, missing_for_slurm, slurm_cluster

IS_LONG = bool(os.environ.get("MEGAM3_LONG"))
STEPS = 320 if IS_LONG else 70
DEATH_SECONDS = 10
"""Slurm takes a node for dead after so long without an answer; its default is 300."""

needs_slurm = pytest.mark.skipif(bool(missing_for_slurm()), reason=missing_for_slurm() or "Slurm is here")


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that notices the death of a node soon."""
    folder = tmp_path_factory.mktemp("mortal")
    with slurm_cluster(folder, settings=f"SlurmdTimeout={DEATH_SECONDS}\n") as running:
        yield running


class Chain:
    """One run and the jobs that carry it."""

    def __init__(self, cluster: Cluster, place: Workplace, name: str):
        self.cluster, self.place, self.name = cluster, place, name
        self.log = place.folder / f"{name}.log"
        self.job = self.submit()

    def submit(self) -> str:
        """The line that somebody types, again and again the same."""
        arguments = [self.place.recipe, f"name={self.name}", f"train.steps={STEPS}"]
        arguments += ["engine.template=zero2", "train.save_every_steps=10", "train.timeout_seconds=40"]
        command = ["sbatch", "--parsable", "--chdir", str(ROOT), "--nodes", "2", "--ntasks-per-node", "1"]
        settings = {
            "PYTHONPATH": str(ROOT),
            "MEGAM3_VENV": sys.prefix,
            "MASTER_ADDR": "127.0.0.1",
            "MEGAM3_SRUN_FLAGS": "--kill-on-bad-exit=0 --wait=5",
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [*command, "--output", str(self.log), "slurm/train.sh", *arguments],
            env={**self.cluster.environ, **settings},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        self.job = done.stdout.strip()
        return self.job

    def wait_for_text(self, text: str, count: int = 1) -> None:
        end = time.monotonic() + 300
        while not self.log.exists() or len(re.findall(text, self.log.read_text())) < count:
            assert time.monotonic() < end, f"no {text!r} in {self.log.read_text()[-4000:]}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_for_text(rf"step {step}/{STEPS}")

    def start_again_now(self) -> None:
        # Slurm holds a requeued job back for two minutes; three seconds are enough to tell its credentials
        # from the last run's
        self.cluster.wait_for(self.job, "PENDING")
        self.cluster.run("scontrol", "update", f"JobId={self.job}", "StartTime=now+3seconds")

    def rank(self, number: int) -> psutil.Process:
        for each in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                is_rank = each.cmdline()[3:5] == ["megam3.train", self.place.recipe]
                if is_rank and each.environ()["SLURM_PROCID"] == str(number):
                    return each
        raise AssertionError(f"no rank {number}")

    def warn(self, step: int) -> None:
        """The time limit is near: the job goes back to the queue."""
        self.wait_for_step(step)
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.job)
        self.start_again_now()

    def end(self) -> dict[str, str]:
        """Its last job's fields."""
        return self.cluster.wait_for(self.job, "COMPLETED", "FAILED", "CANCELLED", seconds=600)


def kill_rank(chain: Chain, step: int) -> None:
    """The kernel ends a rank: it starts again in the allocation."""
    chain.wait_for_step(step)
    chain.rank(1).kill()
    chain.wait_for_text(r"the ranks ended with code 137: starting them again here \(1 of 3\)")


def kill_node(chain: Chain, step: int) -> None:
    """The node of rank 1 dies with all that runs on it, and is back a little later."""
    chain.wait_for_step(step)
    dead, started = chain.rank(1), time.monotonic()
    # its slurmstepd dies with it
    others = [dead.ppid(), dead.pid, *[each.pid for each in dead.children(recursive=True)]]
    chain.cluster.kill_node("n1", *others)
    # the script puts the job back when srun has ended, unless Slurm has noticed the death before and does so
    chain.wait_for_text(
        r"a node does not answer \(code 1\), back to the queue|CANCELLED .* DUE TO NODE FAILURE"
    )
    chain.cluster.wait_for(chain.job, "PENDING", seconds=300)
    print(f"dead node: back in the queue after {time.monotonic() - started:.1f} s")
    chain.cluster.start_node("n1")
    chain.start_again_now()


def kill_job(chain: Chain, step: int) -> None:
    """Somebody ends it for good, and types the same line again later."""
    chain.wait_for_step(step)
    chain.cluster.run("scancel", "--signal=KILL", chain.job)
    fields = chain.cluster.wait_for(chain.job, "CANCELLED", "COMPLETED", "FAILED")
    assert fields["JobState"] == "CANCELLED", chain.log.read_text()[-4000:]
    chain.submit()


@needs_slurm
@pytest.mark.slurm
@pytest.mark.slow
def test_requeues_kills_and_a_dead_node_end_with_the_figures_of_an_undisturbed_run(
    mortal: Cluster, tmp_path: Path
) -> None:
    place = make_workplace(tmp_path)
    whole = Chain(mortal, place, "whole")
    assert whole.end()["ExitCode"] == "0:0", whole.log.read_text()[-4000:]
    chain = Chain(mortal, place, "run")
    if IS_LONG:
        chain.warn(20)
        kill_rank(chain, 70)
        chain.warn(110)
        kill_node(chain, 160)
        chain.warn(210)
        kill_job(chain, 260)
    else:
        kill_node(chain, 20)
        kill_job(chain, 40)
    assert chain.end()["ExitCode"] == "0:0", chain.log.read_text()[-4000:]
    starts = [int(step) for step in re.findall(r"starting at step (\d+)", chain.log.read_text())]
    print(f"starts at {starts}")
    assert len(starts) == (7 if IS_LONG else 3)
    assert place.figures("run") == place.figures("whole")
    assert [row["step"] for row in place.rows("run")] == list(range(1, STEPS + 1))
