"""`megam3 train` for real, in one process, and what `megam3 export` makes of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megam3.embedder import M3Embedder
from megam3.obs.metrics import read_metrics
from tests.launches import make_workplace

ROOT = Path(__file__).resolve().parents[2]


def megam3(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.run(
        [sys.executable, "-m", "megam3", *argv], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.slow
def test_one_process_trains_and_its_checkpoint_is_exported(tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    trained = megam3(tmp_path, "train", "recipe.yaml", "name=alone", "train.steps=2", "engine.template=zero0")
    assert trained.returncode == 0, trained.stderr
    run = place.run("alone")
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss/total" in row] == [1, 2]
    exported = megam3(tmp_path, "export", str(run / "checkpoints" / "step-000002"), "out")
    assert exported.returncode == 0, exported.stderr
    assert "largest difference, lexical head: " in exported.stdout
    assert M3Embedder(str(tmp_path / "out")).encode(["a text"]).dense_vecs.shape == (1, 32)
