"""Ranks that die and start again inside the allocation: slurm/train.sh on a real two-node Slurm."""

from pathlib import Path

import pytest

from tests.slurm.jobs import needs_slurm, submit
from tests.slurm_cluster import Cluster


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
