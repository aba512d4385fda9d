"""Jobs of slurm/train.sh on the two-node cluster, with a probe in place of the trainer, and waiting for
them."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.slurm.scripts import ROOT
from tests.slurm_cluster import Cluster, missing_for_slurm

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
seen["cores"] = sorted(os.sched_getaffinity(0))
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
sys.exit(int(sys.argv[2]) if "fail" in sys.argv and info.rank == 1 else 0)
"""


ONE_A_NODE = ("--ntasks-per-node", "1")


def submit(
    cluster: Cluster,
    out: Path,
    *arguments: str,
    options: Sequence[str] = ONE_A_NODE,
    at: Path = ROOT,
    **environ: str,
) -> str:
    """Submit slurm/train.sh with the probe in place of the trainer, from the folder `at`; returns the job."""
    (out / "probe.py").write_text(PROBE)
    settings = {
        "PYTHONPATH": f"{out}:{ROOT}",
        "PROBE_OUT": str(out),
        "MEGAM3_VENV": sys.prefix,
        "MEGAM3_MODULE": "probe",
    }
    command = ("sbatch", "--chdir", str(ROOT), "--nodes", "2", "--output", str(out / "job.log"))
    done = subprocess.run(
        [*command, *options, str(ROOT / "slurm/train.sh"), *arguments],
        env={**cluster.environ, **settings, **environ},
        cwd=at,
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
    end = time.monotonic() + 300
    while not all((out / name).exists() for name in names):
        assert time.monotonic() < end, (out / "job.log").read_text()
        time.sleep(0.1)


def wait_for_text(path: Path, text: str) -> None:
    end = time.monotonic() + 300
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < end, f"no {text!r} in {path.read_text() if path.exists() else path}"
        time.sleep(0.05)


def start_again_now(cluster: Cluster, job: str) -> None:
    # Slurm holds a requeued job back for two minutes; three seconds are enough to tell its credentials from
    # the first run's
    cluster.wait_for(job, "PENDING")
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+3seconds")
