"""Who the ranks are, and where, for the lines that people type: slurm/train.sh on a real two-node Slurm."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.slurm.jobs import needs_slurm, seen_by, submit
from tests.slurm_cluster import Cluster


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
@pytest.mark.parametrize(
    ("options", "num_ranks", "cpus"),
    [
        (("--gpus-per-node", "2"), 4, None),
        (("--gpus-per-node", "2", "--ntasks-per-node", "1"), 2, None),
        (("--ntasks", "4", "--gpus-per-task", "1"), 4, None),
        (("--ntasks-per-node", "1", "--cpus-per-task", "2"), 2, "2"),
        (("--ntasks-per-node", "2", "--gpus-per-node", "2", "--distribution", "cyclic"), 4, None),
        (("--ntasks", "4", "--gpus", "4", "--distribution", "block:cyclic"), 4, None),
        (("--ntasks", "4", "--gpus-per-task", "1", "--cpus-per-task", "1"), 4, "1"),
        (("--ntasks-per-node", "2", "--distribution", "plane=1"), 4, None),
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
@pytest.mark.parametrize("hosts", [["n1", "n0"], ["n1", "n0", "n1"], ["n0", "n1", "n1", "n0"]])
def test_an_arbitrary_distribution_leads_to_the_host_of_rank_0(
    cluster: Cluster, tmp_path: Path, hosts: list[str]
) -> None:
    file = tmp_path / "my hosts"
    file.write_text("".join(f"{host}\n" for host in hosts))
    job = submit(
        cluster,
        tmp_path,
        "x",
        options=("--ntasks", str(len(hosts)), "--distribution", "arbitrary"),
        SLURM_HOSTFILE=str(file),
    )
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", (
        tmp_path / "job.log"
    ).read_text()
    seen = [seen_by(tmp_path, rank) for rank in range(len(hosts))]
    assert [each["node"] for each in seen] == hosts
    assert [each["local_rank"] for each in seen] == [
        hosts[:rank].count(hosts[rank]) for rank in range(len(hosts))
    ]
    assert {each["master_addr"] for each in seen} == {hosts[0]}


@needs_slurm
@pytest.mark.slurm
@pytest.mark.parametrize(
    ("binding", "cores"),
    [("none", [[0, 1], [0, 1]]), ("map_cpu:1,0", [[1], [0]]), ("cores", [[0], [1]])],
)
def test_ranks_are_bound_as_a_site_says(
    cluster: Cluster, tmp_path: Path, binding: str, cores: list[list[int]]
) -> None:
    if os.sched_getaffinity(0) != {0, 1}:
        pytest.skip("the cores of this machine have other numbers")
    job = submit(
        cluster,
        tmp_path,
        "x",
        options=("--ntasks-per-node", "2", "--cpus-per-task", "1"),
        MEGAM3_SRUN_FLAGS=f"--kill-on-bad-exit=0 --wait=60 --cpu-bind={binding}",
    )
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", (
        tmp_path / "job.log"
    ).read_text()
    assert [seen_by(tmp_path, rank)["cores"] for rank in range(4)] == cores * 2


@needs_slurm
@pytest.mark.slurm
def test_a_job_can_be_submitted_from_anywhere(cluster: Cluster, tmp_path: Path) -> None:
    """`sbatch --chdir CHECKOUT` from another folder; settings that read what is not set, as Lmod does."""
    (tmp_path / "my env.sh").write_text('[ -z "$NOBODY_SETS_THIS" ] && MEGAM3_RANK_LOGS=')
    job = submit(cluster, tmp_path, "x", at=tmp_path, MEGAM3_SLURM_ENV=str(tmp_path / "my env.sh"))
    assert cluster.wait_for(job, "COMPLETED", "FAILED")["ExitCode"] == "0:0", (
        tmp_path / "job.log"
    ).read_text()
    assert [seen_by(tmp_path, rank)["rank"] for rank in range(2)] == [0, 1]


@needs_slurm
@pytest.mark.slurm
def test_every_rank_has_a_log_of_its_own_where_a_site_asks_for_it(cluster: Cluster, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, "fail", "7", MEGAM3_RANK_LOGS=str(tmp_path / "my logs"))
    cluster.wait_for(job, "FAILED")
    assert sorted(path.name for path in (tmp_path / "my logs").iterdir()) == [
        f"{job}-rank0.log",
        f"{job}-rank1.log",
    ]
    assert re.search(
        rf"job {job}, restart 0, nodes n\[0-1\], revision [0-9a-f]{{7,}}", (tmp_path / "job.log").read_text()
    )
