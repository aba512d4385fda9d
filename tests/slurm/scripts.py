"""The scripts of slurm/ started without Slurm: what they say before anything starts."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_script(
    name: str, *arguments: str, at: Path = ROOT, **environ: str
) -> subprocess.CompletedProcess[str]:
    """slurm/`name` with these arguments, in the folder `at`, and an environment of PATH and `environ`
    alone."""
    clean = {"PATH": os.environ["PATH"], **environ}
    bash = shutil.which("bash")
    assert bash
    command = [bash, str(ROOT / "slurm" / name), *arguments]
    return subprocess.run(command, cwd=at, env=clean, capture_output=True, text=True, check=False)
