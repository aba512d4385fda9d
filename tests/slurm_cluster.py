"""A real two-node Slurm on this machine, for tests marked `slurm`: slurmctld and two slurmd on loopback.

Each node has two cores and two GPUs that are copies of /dev/null; jobs of partition `urgent` push out those
of `main`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from megam3.dist.env import free_port

NODES = ("n0", "n1")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "munge", "munged")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={controller_port}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
TaskPluginParam=None
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobRequeue=1
KillWait=20
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9
"""


def missing_for_slurm() -> str:
    """What this machine lacks for a Slurm of its own; empty when nothing."""
    programs = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if programs:
        return f"{', '.join(programs)} not found (Debian: apt-get install slurm-wlm munge)"
    return "" if os.getuid() == 0 else "only root can start slurmd"


@dataclass(frozen=True)
class Cluster:
    """A running cluster; `environ` reaches it."""

    folder: Path
    environ: Mapping[str, str]
    daemons: dict[str, subprocess.Popen] = field(default_factory=dict)
    """By name: slurmctld, n0, n1."""

    def run(self, *command: str, **environ: str) -> str:
        """Standard output of a command; raises with its error output."""
        done = subprocess.run(
            command,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            cwd=self.folder,
            timeout=120,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
        return done.stdout

    def kill_node(self, name: str, *others: int) -> None:
        """A node dies: its slurmd, and the processes `others` that run on it, end at once and say nothing."""
        for pid in (self.daemons[name].pid, *others):
            os.kill(pid, signal.SIGKILL)
        self.daemons[name].wait()

    def start_node(self, name: str) -> None:
        """The node is back."""
        self.daemons[name] = _spawn(["slurmd", "-D", "-N", name], self.environ, self.folder)

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of `scontrol show job`."""
        return dict(
            part.split("=", 1) for part in self.run("scontrol", "show", "job", job_id).split() if "=" in part
        )

    def wait_for(self, job_id: str, *states: str, seconds: float = 300) -> dict[str, str]:
        """Wait until the job is in one of `states`; returns its fields."""
        end = time.monotonic() + seconds
        while (job := self.job(job_id))["JobState"] not in states:
            logs = "\n".join(path.read_text() for path in self.folder.glob("*.log"))
            assert time.monotonic() < end, (
                f"job is {job['JobState']} ({job['Reason']}), not {states}\n{logs[-4000:]}"
            )
            time.sleep(0.3)
        return job


@contextmanager
def slurm_cluster(folder: Path, settings: str = "") -> Iterator[Cluster]:
    """Start nodes n0 and n1 with their files in `folder`; everything started here is stopped at the end.

    Args:
        settings: further lines of slurm.conf.
    """
    ports = _free_ports(3)
    for name in ("state", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    host = socket.gethostname().split(".")[0]
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=100"
        " Gres=gpu:2 State=UNKNOWN"
        for node, port in zip(NODES, ports[1:], strict=True)
    )
    for gpu in range(2):
        os.mknod(folder / f"gpu{gpu}", stat.S_IFCHR | 0o600, os.makedev(1, 3))  # /dev/null under another name
    (folder / "gres.conf").write_text(f"AutoDetect=off\nName=gpu File={folder}/gpu[0-1]\n")
    conf = folder / "slurm.conf"
    text = CONFIG.format(host=host, folder=folder, controller_port=ports[0], nodes=nodes)
    conf.write_text(f"{text}{settings}")
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))
    }
    cluster = Cluster(folder, {**inherited, "PATH": _path(), "SLURM_CONF": str(conf)})
    with ExitStack() as stack:
        _start_munge(stack)
        # every daemon stays a child of the test, so that it can be ended by its id
        for name in ("slurmctld", *NODES):
            command = ["slurmctld", "-D", "-c"] if name == "slurmctld" else ["slurmd", "-D", "-N", name]
            cluster.daemons[name] = _spawn(command, cluster.environ, folder)
            # by name: a node may have been started anew meanwhile
            stack.callback(lambda name=name: _stop(cluster.daemons[name]))
        _wait_until_idle(cluster)
        yield cluster


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return sorted(found)


def _start_munge(stack: ExitStack) -> None:
    if _munge_answers():
        return
    run_dir = Path("/run/munge")
    run_dir.mkdir(exist_ok=True)
    shutil.chown(run_dir, "munge")
    _start(
        stack,
        ["su", "munge", "-s", "/bin/sh", "-c", "exec munged --foreground"],
        dict(os.environ, PATH=_path()),
        run_dir,
    )
    end = time.monotonic() + 120
    while not _munge_answers():
        assert time.monotonic() < end, "munged does not answer"
        time.sleep(0.2)


def _munge_answers() -> bool:
    return (
        subprocess.run(
            ["munge", "-n"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
        ).returncode
        == 0
    )


def _start(stack: ExitStack, command: list[str], environ: Mapping[str, str], folder: Path) -> None:
    stack.callback(_stop, _spawn(command, environ, folder))


def _spawn(command: list[str], environ: Mapping[str, str], folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env=dict(environ),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        start_new_session=True,
    )


def _stop(daemon: subprocess.Popen) -> None:
    daemon.send_signal(signal.SIGTERM)
    try:
        daemon.wait(15)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _wait_until_idle(cluster: Cluster) -> None:
    end = time.monotonic() + 180
    while True:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-p", "main", "-o", "%t"],
            env=dict(cluster.environ),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.stdout.split() == ["idle"] * len(NODES):
            return
        logs = "\n".join(path.read_text()[-2000:] for path in cluster.folder.glob("*.log"))
        assert time.monotonic() < end, f"nodes are not idle: {done.stdout}{done.stderr}\n{logs}"
        time.sleep(0.3)
