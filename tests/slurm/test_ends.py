"""How soon a job is over when one of its ranks has failed and the others would wait for ever."""

from pathlib import Path

import pytest

from tests.slurm.jobs import needs_slurm, submit, wait_for_files
from tests.slurm_cluster import Cluster

# rank 1 fails at once; rank 0 is in something that never ends and that no signal of srun's interrupts
HANG = """
import os, signal, sys, time
from pathlib import Path

rank, out = int(os.environ["SLURM_PROCID"]), Path(os.environ["PROBE_OUT"])
(out / f"ready{rank}").touch()
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
while not (out / "ready0").exists():
    time.sleep(0.05)
if sys.argv[1] == "note":
    Path(os.environ["MEGAM3_FAULT_FILE"]).write_text("1\\n")
sys.exit(1)
"""


@needs_slurm
@pytest.mark.slurm
@pytest.mark.parametrize("flags", ["--kill-on-bad-exit=0 --wait=3", "--kill-on-bad-exit=1"])
def test_ranks_that_would_wait_for_ever_end_soon_after_the_one_that_failed(
    cluster: Cluster, tmp_path: Path, flags: str
) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    job = submit(cluster, tmp_path, "x", MEGAM3_MODULE="hang", MEGAM3_SRUN_FLAGS=flags)
    wait_for_files(tmp_path, "ready0", "ready1")
    # what ended rank 0 is 137 or 9 to srun, and the highest code is the job's
    fields = cluster.wait_for(job, "FAILED", "COMPLETED", "CANCELLED", seconds=300)
    assert fields["JobState"] == "FAILED", (tmp_path / "job.log").read_text()
    assert fields["Restarts"] == "0"


@needs_slurm
@pytest.mark.slurm
def test_an_error_that_would_come_again_starts_nothing_anew_though_its_peers_had_to_be_killed(
    cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "hang.py").write_text(HANG)
    flags = "--kill-on-bad-exit=0 --wait=3"
    job = submit(cluster, tmp_path, "note", MEGAM3_MODULE="hang", MEGAM3_SRUN_FLAGS=flags)
    fields = cluster.wait_for(job, "FAILED", "COMPLETED", "CANCELLED", seconds=120)
    log = (tmp_path / "job.log").read_text()
    assert (fields["JobState"], fields["ExitCode"]) == ("FAILED", "1:0"), log
    assert "starting them again here" not in log
    assert not list(tmp_path.glob(".megam3-fault-*"))
