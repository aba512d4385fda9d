"""slurm/train.sh on a real two-node Slurm: who the ranks are, that they meet, that signals reach them, and the way back to the queue."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launches import make_workplace
from tests.slurm_cluster import Cluster, missing_for_slurm

ROOT = Path(__file__).resolve().parents[2]
needs_slurm = pytest.mark.skipif(bool(missing_for_slurm()), reason=missing_for_slurm() or "Slurm is here")

# stands in for megam3.train: says who it is, meets the other ranks when told to, and leaves as the trainer does
PROBE = """
import dataclasses, json, os, signal, sys, time
from pathlib import Path
from megam3.dist.env import discover_ranks

info = discover_ranks(os.environ)
restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
out = Path(os.environ["PROBE_OUT"])
seen = {**dataclasses.asdict(info), "node": os.environ["SLURMD_NODENAME"], "arguments": sys.argv[1:], "restart": restart}
if "meet" in sys.argv:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://{info.master_addr}:{info.master_port}", rank=info.rank, world_size=info.world_size)
    gathered = [None] * info.world_size
    dist.all_gather_object(gathered, info.rank)
    seen["met"] = gathered
    dist.barrier()
    dist.destroy_process_group()
(out / f"rank{info.rank}.{restart}.json").write_text(json.dumps(seen))
if "wait" in sys.argv and restart == 0:
    got = []
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, frame: got.append(signal.Signals(number).name))
    (out / f"ready{info.rank}").touch()
    while not got:
        time.sleep(0.05)
    time.sleep(info.rank)  # ranks do not leave together
    (out / f"signal{info.rank}").write_text(got[0])
    sys.exit(85)
sys.exit(7 if "fail" in sys.argv and info.rank == 1 else 0)
"""


def submit(cluster: Cluster, out: Path, *arguments: str, **environ: str) -> str:
    (out / "probe.py").write_text(PROBE)
    settings = {
        "PYTHONPATH": f"{out}:{ROOT}",
        "PROBE_OUT": str(out),
        "MEGAM3_VENV": sys.prefix,
        "MEGAM3_MODULE": "probe",
    }
    command = (
        "sbatch",
        "--chdir",
        str(ROOT),
        "--nodes",
        "2",
        "--ntasks-per-node",
        "1",
        "--output",
        str(out / "job.log"),
    )
    done = subprocess.run(
        [*command, "slurm/train.sh", *arguments],
        env={**cluster.environ, **settings, **environ},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"\d+", done.stdout)
    assert found
    return found.group()


def seen_by(out: Path, rank: int, restart: int = 0) -> dict:
    path = out / f"rank{rank}.{restart}.json"
    assert path.exists(), (out / "job.log").read_text()
    return json.loads(path.read_text())


def wait_for_files(out: Path, *names: str) -> None:
    end = time.monotonic() + 60
    while not all((out / name).exists() for name in names):
        assert time.monotonic() < end, (out / "job.log").read_text()
        time.sleep(0.1)


@needs_slurm
@pytest.mark.slurm
def test_two_nodes_are_two_ranks_that_name_the_same_master(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "my.yaml", "data.train.0.name=a b", "optim.lr=1e-5")
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0"
    for rank, node in enumerate(("n0", "n1")):
        seen = seen_by(tmp_path, rank)
        assert (seen["rank"], seen["local_rank"], seen["world_size"], seen["node"]) == (rank, 0, 2, node)
        assert (seen["master_addr"], seen["master_port"], seen["source"]) == (
            "n0",
            12_000 + int(job) * 10,
            "slurm",
        )
        assert seen["arguments"] == ["my.yaml", "data.train.0.name=a b", "optim.lr=1e-5"]


@needs_slurm
@pytest.mark.slurm
def test_ranks_meet_where_the_site_says(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "meet", MASTER_ADDR="127.0.0.1")
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0"
    assert [seen_by(tmp_path, rank)["met"] for rank in range(2)] == [[0, 1], [0, 1]]


@needs_slurm
@pytest.mark.slurm
@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_signal_reaches_every_rank_and_the_job_goes_back_to_the_queue(
    cluster: Cluster, tmp_path: Path, name: str
) -> None:
    job = submit(cluster, tmp_path, "wait")
    wait_for_files(tmp_path, "ready0", "ready1")
    # what Slurm does at the time of `#SBATCH --signal=B:USR1@300`: the batch shell alone gets it
    cluster.run("scancel", "--batch", f"--signal={name}", job)
    wait_for_files(tmp_path, "signal0", "signal1")
    assert {(tmp_path / f"signal{rank}").read_text() for rank in range(2)} == {"SIGUSR1"}
    # Slurm holds a requeued job back for two minutes; three seconds are enough to tell its credentials from those of the first run
    cluster.wait_for(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")
    fields = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (fields["Restarts"], fields["ExitCode"]) == ("1", "0:0")
    assert [seen_by(tmp_path, rank, restart=1)["rank"] for rank in range(2)] == [0, 1]
    assert "back to the queue (restart 1)" in (tmp_path / "job.log").read_text()


@needs_slurm
@pytest.mark.slurm
def test_the_number_of_restarts_is_limited(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "wait", MEGAM3_MAX_REQUEUES="0")
    wait_for_files(tmp_path, "ready0", "ready1")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait_for(job, "FAILED", "COMPLETED")["ExitCode"] == "85:0"
    assert "stopped after 0 restarts (MEGAM3_MAX_REQUEUES)" in (tmp_path / "job.log").read_text()


@needs_slurm
@pytest.mark.slurm
def test_a_failure_is_the_jobs_failure(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "fail")
    assert cluster.wait_for(job, "FAILED", "COMPLETED")["ExitCode"] == "7:0"


@needs_slurm
@pytest.mark.slurm
def test_a_real_run_on_two_nodes_is_interrupted_requeued_and_ends(cluster: Cluster, tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "place")
    arguments = [place.recipe, "train.steps=200", "engine.template=zero3", "train.keep_checkpoints=2"]
    job = submit(cluster, tmp_path, *arguments, MEGAM3_MODULE="megam3.train", MASTER_ADDR="127.0.0.1")
    log, run = tmp_path / "job.log", place.run("run")
    wait_for_text(log, "step 3/200")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_text(log, "back to the queue (restart 1)")
    stopped = int((run / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert 3 <= stopped < 200
    cluster.wait_for(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")
    fields = cluster.wait_for(job, "COMPLETED", "FAILED", seconds=240)
    assert (fields["Restarts"], fields["ExitCode"]) == ("1", "0:0"), log.read_text()[-4000:]
    assert (
        f"2 ranks, ZeRO stage 3, 200 steps (40.00 epochs of 5), starting at step {stopped}" in log.read_text()
    )
    assert [row["step"] for row in place.rows("run")] == list(range(1, 201))
    assert (run / "checkpoints" / "latest").read_text() == "step-000200"


def wait_for_text(path: Path, text: str) -> None:
    end = time.monotonic() + 120
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, f"no {text!r} in {path.read_text() if path.exists() else path}"
        time.sleep(0.05)


def run_script(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    clean = {"PATH": os.environ["PATH"], **environ}
    bash = shutil.which("bash")
    assert bash
    return subprocess.run(
        [bash, "slurm/train.sh", *arguments], cwd=ROOT, env=clean, capture_output=True, text=True, check=False
    )


def test_messages_before_anything_starts(tmp_path: Path) -> None:
    done = run_script(SLURM_SUBMIT_DIR=str(ROOT))
    assert (done.returncode, done.stderr) == (
        2,
        "slurm/train.sh: a recipe is required: sbatch slurm/train.sh RECIPE [key=value…]\n",
    )
    done = run_script("x", SLURM_SUBMIT_DIR=str(ROOT), MEGAM3_VENV=str(tmp_path))
    assert done.returncode == 2
    assert f"no {tmp_path}/bin/python: run make once, or set MEGAM3_VENV" in done.stderr
    assert "run this with sbatch" in run_script("x").stderr


def test_the_exit_code_is_the_trainers() -> None:
    script = re.search(r"REQUEUE_CODE=(\d+)", (ROOT / "slurm/train.sh").read_text())
    trainer = re.search(r"^EXIT_REQUEUE = (\d+)", (ROOT / "megam3/trainer.py").read_text(), re.MULTILINE)
    assert script and trainer  # noqa: PT018
    assert script.group(1) == trainer.group(1)
