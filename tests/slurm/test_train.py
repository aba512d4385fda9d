"""slurm/train.sh on a real two-node Slurm: who the ranks are, that they meet, that signals reach them, and
the way back to the queue."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from megam3.obs.health import EXIT_STALLED
from megam3.obs.stop import EXIT_REQUEUE, EXIT_STOPPED
from tests.launches import make_workplace
from tests.slurm_cluster import Cluster, missing_for_slurm

ROOT = Path(__file__).resolve().parents[2]
needs_slurm = pytest.mark.skipif(bool(missing_for_slurm()), reason=missing_for_slurm() or "Slurm is here")

# stands in for megam3.train: says who it is, meets the other ranks when told to, and leaves as the trainer
# does
PROBE = """
import dataclasses, json, os, signal, sys, time
from pathlib import Path
from megam3.dist.env import discover_ranks

info = discover_ranks(os.environ)
restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
out = Path(os.environ["PROBE_OUT"])
seen = {**dataclasses.asdict(info), "node": os.environ["SLURMD_NODENAME"], "restart": restart}
seen["arguments"] = sys.argv[1:]
if "meet" in sys.argv:
    import torch.distributed as dist

    url = f"tcp://{info.master_addr}:{info.master_port}"
    dist.init_process_group("gloo", init_method=url, rank=info.rank, world_size=info.world_size)
    gathered = [None] * info.world_size
    dist.all_gather_object(gathered, info.rank)
    seen["met"] = gathered
    dist.barrier()
    dist.destroy_process_group()
seen["cpus_per_task"] = os.environ.get("SRUN_CPUS_PER_TASK")
seen["job"] = os.environ.get("MEGAM3_JOB")
attempt = len(list(out.glob(f"attempt{info.rank}.*")))
(out / f"attempt{info.rank}.{attempt}").touch()
(out / f"rank{info.rank}.{restart}.json").write_text(json.dumps(seen))
if "die" in sys.argv and info.rank == 1 and attempt < int(sys.argv[2]):
    os.kill(os.getpid(), signal.SIGKILL)
if "unready" in sys.argv and restart == 0:
    (out / f"ready{info.rank}").touch()
    time.sleep(600)
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


ONE_A_NODE = ("--ntasks-per-node", "1")


def submit(
    cluster: Cluster, out: Path, *arguments: str, options: Sequence[str] = ONE_A_NODE, **environ: str
) -> str:
    (out / "probe.py").write_text(PROBE)
    settings = {
        "PYTHONPATH": f"{out}:{ROOT}",
        "PROBE_OUT": str(out),
        "MEGAM3_VENV": sys.prefix,
        "MEGAM3_MODULE": "probe",
    }
    command = ("sbatch", "--chdir", str(ROOT), "--nodes", "2", "--output", str(out / "job.log"))
    done = subprocess.run(
        [*command, *options, "slurm/train.sh", *arguments],
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
def test_the_warning_reaches_every_rank_and_the_job_goes_back_to_the_queue(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path, "wait")
    wait_for_files(tmp_path, "ready0", "ready1")
    # what Slurm does at the time of `#SBATCH --signal=B:USR1@300`: the batch shell alone gets it
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    wait_for_files(tmp_path, "signal0", "signal1")
    assert {(tmp_path / f"signal{rank}").read_text() for rank in range(2)} == {"SIGUSR1"}
    start_again_now(cluster, job)
    fields = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (fields["Restarts"], fields["ExitCode"]) == ("1", "0:0")
    assert [seen_by(tmp_path, rank, restart=1)["rank"] for rank in range(2)] == [0, 1]
    assert [seen_by(tmp_path, rank, restart=1)["job"] for rank in range(2)] == [job, job]
    assert "saved, back to the queue (restart 1)" in (tmp_path / "job.log").read_text()


def start_again_now(cluster: Cluster, job: str) -> None:
    # Slurm holds a requeued job back for two minutes; three seconds are enough to tell its credentials from
    # the first run's
    cluster.wait_for(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")


@needs_slurm
@pytest.mark.slurm
@pytest.mark.parametrize(
    ("how", "state"),
    [
        (("scancel",), "CANCELLED"),
        (("scancel", "--full"), "CANCELLED"),
        (("scancel", "--batch", "--signal=TERM"), "FAILED"),
    ],
)
def test_a_cancelled_job_saves_and_stays_away(
    cluster: Cluster, tmp_path: Path, how: Sequence[str], state: str
) -> None:
    job = submit(cluster, tmp_path, "wait")
    wait_for_files(tmp_path, "ready0", "ready1")
    cluster.run(*how, job)
    wait_for_files(tmp_path, "signal0", "signal1")
    fields = cluster.wait_for(job, "CANCELLED", "FAILED", "COMPLETED", "PENDING")
    assert (fields["JobState"], fields["Restarts"]) == (state, "0"), (tmp_path / "job.log").read_text()
    if state == "FAILED":
        assert fields["ExitCode"] == "143:0"
        assert "cancelled; the newest checkpoint is where it continues" in (tmp_path / "job.log").read_text()


@needs_slurm
@pytest.mark.slurm
def test_a_job_that_another_one_pushes_out_saves_and_comes_back(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "wait", options=(*ONE_A_NODE, "--exclusive"))
    wait_for_files(tmp_path, "ready0", "ready1")
    urgent = cluster.run(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--output=/dev/null",
        "--wrap=sleep 2",
    ).strip()
    wait_for_files(tmp_path, "signal0", "signal1")
    cluster.wait_for(urgent, "COMPLETED")
    start_again_now(cluster, job)
    fields = cluster.wait_for(job, "COMPLETED", "FAILED", "CANCELLED")
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "1"), (tmp_path / "job.log").read_text()


@needs_slurm
@pytest.mark.slurm
def test_a_warning_before_any_rank_has_started_is_remembered(cluster: Cluster, tmp_path: Path) -> None:
    site = tmp_path / "env.sh"
    site.write_text(
        f". slurm/env.sh\ntouch {tmp_path}/ready\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.1; done\n"
    )
    job = submit(cluster, tmp_path, "x", MEGAM3_SLURM_ENV=str(site))
    wait_for_files(tmp_path, "ready")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    time.sleep(0.5)
    (tmp_path / "go").touch()
    start_again_now(cluster, job)
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["Restarts"] == "1"
    assert not (tmp_path / "rank0.0.json").exists()
    assert (tmp_path / "rank0.1.json").exists()


@needs_slurm
@pytest.mark.slurm
def test_a_warning_that_kills_ranks_while_they_start_is_no_failure(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "unready")
    wait_for_files(tmp_path, "ready0", "ready1")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    start_again_now(cluster, job)
    fields = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (fields["Restarts"], fields["ExitCode"]) == ("1", "0:0"), (tmp_path / "job.log").read_text()
    assert "interrupted (code 138), back to the queue" in (tmp_path / "job.log").read_text()


@needs_slurm
@pytest.mark.slurm
def test_a_killed_rank_costs_a_restart_inside_the_allocation(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "die", "2", MEGAM3_SRUN_FLAGS="--kill-on-bad-exit=0 --wait=2")
    fields = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (fields["Restarts"], fields["ExitCode"]) == ("0", "0:0"), (tmp_path / "job.log").read_text()
    assert len(list(tmp_path.glob("attempt1.*"))) == 3
    assert "ended with code 137: starting them again here (2 of 3)" in (tmp_path / "job.log").read_text()


@needs_slurm
@pytest.mark.slurm
def test_ranks_that_die_again_and_again_end_the_job_without_a_requeue(
    cluster: Cluster, tmp_path: Path
) -> None:
    job = submit(
        cluster,
        tmp_path,
        "die",
        "99",
        MEGAM3_MAX_RESTARTS="1",
        MEGAM3_SRUN_FLAGS="--kill-on-bad-exit=0 --wait=2",
    )
    fields = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (fields["Restarts"], fields["ExitCode"]) == ("0", "137:0")
    assert len(list(tmp_path.glob("attempt1.*"))) == 2
    assert "ended with code 137 2 times, each within 600 s" in (tmp_path / "job.log").read_text()


@needs_slurm
@pytest.mark.slurm
@pytest.mark.parametrize(
    ("options", "num_ranks", "cpus"),
    [
        (("--gpus-per-node", "2"), 4, None),
        (("--gpus-per-node", "2", "--ntasks-per-node", "1"), 2, None),
        (("--ntasks", "4", "--gpus-per-task", "1"), 4, None),
        (("--ntasks-per-node", "1", "--cpus-per-task", "2"), 2, "2"),
        (("--ntasks-per-node", "2", "--gpus-per-node", "2", "--distribution", "cyclic"), 4, None),
    ],
)
def test_launch_lines_that_people_type(
    cluster: Cluster, tmp_path: Path, options: Sequence[str], num_ranks: int, cpus: str | None
) -> None:
    job = submit(cluster, tmp_path, "x", options=options)
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", (
        tmp_path / "job.log"
    ).read_text()
    seen = [seen_by(tmp_path, rank) for rank in range(num_ranks)]
    assert [each["world_size"] for each in seen] == [num_ranks] * num_ranks
    assert sorted(each["local_rank"] for each in seen) == sorted(list(range(num_ranks // 2)) * 2)
    assert {each["cpus_per_task"] for each in seen} == {cpus}
    assert {each["master_addr"] for each in seen} == {seen[0]["node"]}


@needs_slurm
@pytest.mark.slurm
def test_an_arbitrary_distribution_leads_to_the_host_of_rank_0(cluster: Cluster, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("n1\nn0\n")
    job = submit(
        cluster,
        tmp_path,
        "x",
        options=("--ntasks", "2", "--distribution", "arbitrary"),
        SLURM_HOSTFILE=str(hosts),
    )
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", (
        tmp_path / "job.log"
    ).read_text()
    seen = [seen_by(tmp_path, rank) for rank in range(2)]
    assert [each["node"] for each in seen] == ["n1", "n0"]
    assert {each["master_addr"] for each in seen} == {"n1"}


@needs_slurm
@pytest.mark.slurm
def test_every_rank_has_a_log_of_its_own_where_a_site_asks_for_it(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "fail", MEGAM3_RANK_LOGS=str(tmp_path / "my logs"))
    cluster.wait_for(job, "FAILED")
    assert sorted(path.name for path in (tmp_path / "my logs").iterdir()) == [
        f"{job}-rank0.log",
        f"{job}-rank1.log",
    ]
    assert re.search(
        rf"job {job}, restart 0, nodes n\[0-1\], revision [0-9a-f]{{7,}}", (tmp_path / "job.log").read_text()
    )


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
    start_again_now(cluster, job)
    fields = cluster.wait_for(job, "COMPLETED", "FAILED", seconds=240)
    assert (fields["Restarts"], fields["ExitCode"]) == ("1", "0:0"), log.read_text()[-4000:]
    assert (
        f"2 ranks, ZeRO stage 3, 200 steps (40.00 epochs of 5), starting at step {stopped}" in log.read_text()
    )
    assert [row["step"] for row in place.rows("run")] == list(range(1, 201))
    assert (run / "checkpoints" / "latest").read_text() == "step-000200"


@needs_slurm
@pytest.mark.slurm
def test_two_requeues_and_a_killed_rank_end_with_the_figures_of_an_undisturbed_run(
    cluster: Cluster, tmp_path: Path
) -> None:
    place = make_workplace(tmp_path / "place")
    arguments = [place.recipe, "train.steps=120", "engine.template=zero2", "train.save_every_steps=10"]
    settings = {"MEGAM3_MODULE": "megam3.train", "MASTER_ADDR": "127.0.0.1"}
    settings["MEGAM3_SRUN_FLAGS"] = "--kill-on-bad-exit=0 --wait=3"
    whole = submit(cluster, tmp_path, *arguments, "name=whole", **settings)
    fields = cluster.wait_for(whole, "COMPLETED", "FAILED", seconds=240)
    log = tmp_path / "job.log"
    assert fields["ExitCode"] == "0:0", log.read_text()[-4000:]
    log.unlink()
    job = submit(cluster, tmp_path, *arguments, **settings)
    wait_for_text(log, "step 5/120")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    start_again_now(cluster, job)
    wait_for_text(log, "step 40/120")
    victims = [
        each
        for each in psutil.process_iter()
        if each.cmdline()[3:5] == ["megam3.train", place.recipe] and each.environ()["SLURM_PROCID"] == "1"
    ]
    victims[0].kill()
    wait_for_text(log, "the ranks ended with code 137: starting them again here (1 of 3)")
    wait_for_text(log, "step 80/120")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    start_again_now(cluster, job)
    fields = cluster.wait_for(job, "COMPLETED", "FAILED", seconds=240)
    assert (fields["Restarts"], fields["ExitCode"]) == ("2", "0:0"), log.read_text()[-4000:]
    assert place.figures("run") == place.figures("whole")
    assert [row["step"] for row in place.rows("run")] == list(range(1, 121))


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


def test_the_exit_codes_are_those_of_the_package() -> None:
    script = (ROOT / "slurm/train.sh").read_text()
    for name, code in (("REQUEUE", EXIT_REQUEUE), ("STOPPED", EXIT_STOPPED), ("STALLED", EXIT_STALLED)):
        assert f"readonly {name}_CODE={code}" in script
