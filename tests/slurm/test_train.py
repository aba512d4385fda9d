"""slurm/train.sh before it starts anything: its messages and its codes."""

from pathlib import Path

from megam3.obs.health import EXIT_STALLED
from megam3.obs.stop import EXIT_REQUEUE, EXIT_STOPPED
from tests.slurm.scripts import ROOT, run_script


def test_messages_before_anything_starts(tmp_path: Path) -> None:
    done = run_script("train.sh", SLURM_SUBMIT_DIR=str(ROOT))
    assert (done.returncode, done.stderr) == (
        2,
        "slurm/train.sh: a recipe is required: sbatch slurm/train.sh RECIPE [key=value…]\n",
    )
    done = run_script("train.sh", "x", SLURM_SUBMIT_DIR=str(ROOT), MEGAM3_VENV=str(tmp_path))
    assert done.returncode == 2
    assert f"no {tmp_path}/bin/python: run make once, or set MEGAM3_VENV" in done.stderr
    assert "run this with sbatch" in run_script("train.sh", "x").stderr


def test_the_exit_codes_are_those_of_the_package() -> None:
    script = (ROOT / "slurm/train.sh").read_text()
    for name, code in (
        ("REQUEUE", EXIT_REQUEUE),
        ("STOPPED", EXIT_STOPPED),
        ("STALLED", EXIT_STALLED),
        ("FAILED", 1),
    ):
        assert f"readonly {name}_CODE={code}" in script
