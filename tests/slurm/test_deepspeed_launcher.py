"""`deepspeed --launcher slurm` trains on two nodes: its `srun` asks Slurm for them, the ranks are Slurm's.

It starts scripts only, like DeepSpeed's MPICH helper, hence tools/train.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.launches import make_workplace
from tests.slurm.jobs import needs_slurm
from tests.slurm.scripts import ROOT
from tests.slurm_cluster import Cluster


@needs_slurm
@pytest.mark.slurm
def test_deepspeed_by_slurm(cluster: Cluster, tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "place")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("n0 slots=1\nn1 slots=1\n")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)]
    command += ["--launcher", "slurm", "--no_ssh_check", "--master_addr", "127.0.0.1"]
    command += ["--launcher_args", "--ntasks-per-node=1 --label"]
    command += [str(ROOT / "tools" / "train.py"), place.recipe, "name=by-slurm", "train.steps=2"]
    environ = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        # the meeting point: DeepSpeed's --master_addr does not reach the ranks here
        env={**cluster.environ, **environ, "MASTER_ADDR": "127.0.0.1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "2 ranks, ZeRO stage" in done.stdout, done.stdout[-6000:]
    assert [row["step"] for row in place.rows("by-slurm")] == [1, 2], done.stdout[-6000:]
