"""Limits of a job's cgroup, in the two versions that clusters have, beside what the host has left."""

from pathlib import Path

import pytest

from megam3.checkpoint import host_memory
from megam3.checkpoint.host_memory import available_bytes

FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
NO_LIMIT = {2: "max", 1: "9223372036854771712"}


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /sys/fs/cgroup; `own` beside it is /proc/self/cgroup."""
    monkeypatch.setattr(host_memory, "CGROUP_FOLDER", tmp_path / "cgroup")
    monkeypatch.setattr(host_memory, "OWN_CGROUP", tmp_path / "own")
    return tmp_path / "cgroup"


def write_group(folder: Path, version: int, limit: str, used: int, cache: int = 500_000) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    limit_file, used_file, cache_line = FILES[version]
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / used_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 1000000\n{cache_line} {cache}\n")


def test_without_groups_it_is_the_hosts(groups: Path) -> None:
    lines = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    (total,) = (int(line[1]) * 1024 for line in lines if line[0] == "MemTotal:")
    assert 1 << 24 < available_bytes() <= total
    groups.parent.joinpath("own").write_text("0::/nowhere\n12:cpu,cpuacct:/a\n5:memory:/nowhere\n")
    assert 1 << 24 < available_bytes() <= total


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_below_the_hosts_counts_less_what_is_used(groups: Path, version: int) -> None:
    root = groups if version == 2 else groups / "memory"
    line = "0::/box" if version == 2 else "7:memory:/box"
    groups.parent.joinpath("own").write_text(f"12:cpuset:/box\n{line}\n1:name=systemd:/box\n")
    write_group(root / "box", version, "5000000", 4_000_000)
    assert available_bytes() == 1_500_000
    write_group(root / "box", version, NO_LIMIT[version], 4_000_000)
    assert available_bytes() > 1 << 24
    # a container sees its own limit at the root of what is mounted
    write_group(root, version, "3000000", 1_000_000, cache=0)
    assert available_bytes() == 2_000_000


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_slurm_job_counts_though_its_tasks_have_none(groups: Path, version: int) -> None:
    """As Slurm lays it out: the limit is on job and step, processes are in the tasks below."""
    job = "system.slice/n0_slurmstepd.scope/job_7" if version == 2 else "slurm/uid_0/job_7"
    task = f"{job}/step_0/user/task_0" if version == 2 else f"{job}/step_0/task_0"
    root, controller = (groups, "0:") if version == 2 else (groups / "memory", "5:memory")
    groups.parent.joinpath("own").write_text(f"{controller}:/{task}\n")
    write_group(root / task, version, NO_LIMIT[version], 1_000_000)
    write_group(root / job, version, "5000000", 3_000_000)
    assert available_bytes() == 2_500_000


def test_with_both_versions_the_limits_are_where_the_files_are(groups: Path) -> None:
    groups.parent.joinpath("own").write_text("5:memory:/slurm/job_7\n0::/system.slice/slurmd.service\n")
    write_group(groups / "memory" / "slurm" / "job_7", 1, "5000000", 3_000_000)
    assert available_bytes() == 2_500_000
    write_group(groups / "system.slice", 2, "4000000", 3_000_000, cache=0)
    assert available_bytes() == 1_000_000


def test_a_path_with_a_colon_is_one_path(groups: Path) -> None:
    groups.parent.joinpath("own").write_text("0::/a:b/c\n")
    write_group(groups / "a:b", 2, "4000000", 3_000_000, cache=0)
    assert available_bytes() == 1_000_000
