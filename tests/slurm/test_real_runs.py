"""Real training under slurm/train.sh on a real two-node Slurm, interrupted on its way."""

from pathlib import Path

import psutil
import pytest

from tests.launches import make_workplace
from tests.slurm.jobs import needs_slurm, start_again_now, submit, wait_for_text
from tests.slurm_cluster import Cluster


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
    fields = cluster.wait_for(job, "COMPLETED", "FAILED", seconds=600)
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
    fields = cluster.wait_for(whole, "COMPLETED", "FAILED", seconds=600)
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
    fields = cluster.wait_for(job, "COMPLETED", "FAILED", seconds=600)
    assert (fields["Restarts"], fields["ExitCode"]) == ("2", "0:0"), log.read_text()[-4000:]
    assert place.figures("run") == place.figures("whole")
    assert [row["step"] for row in place.rows("run")] == list(range(1, 121))
