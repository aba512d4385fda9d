"""How much host memory may still be taken: what Linux estimates, or less where a job's cgroup ends first.

Slurm's ConstrainRAMSpace, Kubernetes and systemd limit groups of processes. Every group above a process may
have a limit: Slurm sets one on a job and its step, and a task has a group of its own below those, without.

    /proc/self/cgroup                /sys/fs/cgroup/
    0::/slurm/job_7/task_0           slurm/job_7/memory.max                       version 2
    5:memory:/slurm/job_7/task_0     memory/slurm/job_7/memory.limit_in_bytes     version 1
    lines of both                    the limits are where the files are
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CGROUP_FOLDER = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
UNLIMITED = 1 << 62


@dataclass(frozen=True)
class _Names:
    """Files of a group, and the line of memory.stat that counts the page cache that can go."""

    limit: str
    used: str
    cache: str


_VERSION_2 = _Names("memory.max", "memory.current", "inactive_file")
_VERSION_1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def available_bytes() -> int:
    """Host memory that this process may still take."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    return min([free, *(_left_at(folder, names) for folder, names in _groups())])


def _groups() -> Iterator[tuple[Path, _Names]]:
    """This process's own group and all above it, as far as this machine shows them."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            home, names = CGROUP_FOLDER, _VERSION_2
        elif "memory" in controllers.split(","):
            home, names = CGROUP_FOLDER / "memory", _VERSION_1
        else:
            continue
        folder = home / path.lstrip("/")
        yield from ((level, names) for level in (folder, *folder.parents) if level.is_relative_to(home))


def _left_at(folder: Path, names: _Names) -> int:
    """Below the limit of one group; the page cache in it counts as free."""
    try:
        limit = (folder / names.limit).read_text().strip()
        if limit == "max":
            return UNLIMITED
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / names.used).read_text()) - int(stat.get(names.cache, 0))
        return int(limit) - used
    except (OSError, ValueError):
        return UNLIMITED
