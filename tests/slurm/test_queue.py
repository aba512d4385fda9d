"""Signals, and the way back to the queue: slurm/train.sh on a real two-node Slurm."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.slurm.jobs import ONE_A_NODE, needs_slurm, seen_by, start_again_now, submit, wait_for_files
from tests.slurm_cluster import Cluster


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
    # the batch shell reads this before it starts a rank, and stays here until it has taken note of the signal
    site.write_text(
        f". slurm/env.sh\ntouch {tmp_path}/ready\n"
        'for i in $(seq 1200); do [ "$warned" = 1 ] || sleep 0.1; done\n'
    )
    job = submit(cluster, tmp_path, "x", MEGAM3_SLURM_ENV=str(site))
    wait_for_files(tmp_path, "ready")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
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
def test_the_number_of_restarts_is_limited(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "wait", MEGAM3_MAX_REQUEUES="0")
    wait_for_files(tmp_path, "ready0", "ready1")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    assert cluster.wait_for(job, "FAILED", "COMPLETED")["ExitCode"] == "85:0"
    assert "stopped after 0 restarts (MEGAM3_MAX_REQUEUES)" in (tmp_path / "job.log").read_text()


@needs_slurm
@pytest.mark.slurm
@pytest.mark.parametrize("code", [1, 2, 7])
def test_a_failure_is_the_jobs_failure(cluster: Cluster, tmp_path: Path, code: int) -> None:
    """A traceback, a user's error (bad recipe, bad data, not finite), anything else: nothing starts again."""
    job = submit(cluster, tmp_path, "fail", str(code))
    fields = cluster.wait_for(job, "FAILED", "COMPLETED")
    assert (fields["ExitCode"], fields["Restarts"]) == (f"{code}:0", "0")
    assert len(list(tmp_path.glob("attempt1.*"))) == 1


@needs_slurm
@pytest.mark.slurm
def test_where_jobs_are_not_requeued_that_is_said(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "wait", options=(*ONE_A_NODE, "--no-requeue"))
    wait_for_files(tmp_path, "ready0", "ready1")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    fields = cluster.wait_for(job, "FAILED", "COMPLETED")
    assert (fields["Restarts"], fields["ExitCode"]) == ("0", "85:0")
    said = "this site does not requeue jobs; submit the same line again, the run continues from its newest"
    assert said in (tmp_path / "job.log").read_text()


@needs_slurm
@pytest.mark.slurm
def test_a_task_of_an_array_goes_back_to_the_queue_alone(cluster: Cluster, tmp_path: Path) -> None:
    site = tmp_path / "env.sh"
    site.write_text(". slurm/env.sh\nexport PROBE_OUT+=/$SLURM_ARRAY_TASK_ID\nmkdir -p $PROBE_OUT\n")
    options = ("--nodes=1", *ONE_A_NODE, "--array=0-1")
    job = submit(cluster, tmp_path, "wait", options=options, MEGAM3_SLURM_ENV=str(site))
    wait_for_files(tmp_path, "0/ready0", "1/ready0")
    # the last task, whose number is the array's
    assert cluster.job(f"{job}_1")["JobId"] == job
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_1")
    cluster.wait_for(f"{job}_1", "PENDING", "COMPLETED", "FAILED")
    first, last = (cluster.job(f"{job}_{task}") for task in range(2))
    cluster.run("scancel", job)
    assert (last["JobState"], last["Restarts"]) == ("PENDING", "1"), (tmp_path / "job.log").read_text()
    assert (first["JobState"], first["Restarts"]) == ("RUNNING", "0")
    cluster.wait_for(f"{job}_0", "CANCELLED", "FAILED", "COMPLETED")
