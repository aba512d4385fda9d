"""slurm/mine.sh on a real two-node Slurm: two ranks share the mining."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.pairs import write_jsonl
from tests.factory import make_sentences, make_tiny_model_folder
from tests.slurm.scripts import ROOT, run_script
from tests.slurm_cluster import Cluster, missing_for_slurm

needs_slurm = pytest.mark.skipif(bool(missing_for_slurm()), reason=missing_for_slurm() or "Slurm is here")


@needs_slurm
@pytest.mark.slurm
def test_two_ranks_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    model = make_tiny_model_folder(tmp_path / "model", max_tokens=64)
    sentences = make_sentences(40, seed=3)
    records = [{"query": sentences[n][:30], "pos": [sentences[n + 1]]} for n in range(10)]
    pairs = write_jsonl(tmp_path / "pairs.jsonl", records)
    environ = {
        **cluster.environ,
        "PYTHONPATH": str(ROOT),
        "MEGAM3_VENV": sys.prefix,
        "MASTER_ADDR": "127.0.0.1",
    }
    options = [
        "--chdir",
        str(ROOT),
        "--nodes",
        "2",
        "--ntasks-per-node",
        "1",
        "--output",
        str(tmp_path / "log"),
    ]
    own = [str(pairs), "--model", str(model), "--output", str(tmp_path / "mined.jsonl"), "--range", "0-20"]
    command = ["sbatch", *options, "slurm/mine.sh", *own, "--negatives", "3", "--device", "cpu"]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.search(r"\d+", done.stdout)
    assert found
    fields = cluster.wait_for(found.group(), "COMPLETED", "FAILED")
    assert fields["ExitCode"] == "0:0", (tmp_path / "log").read_text()
    mined = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert [len(record["neg"]) for record in mined] == [3] * 10
    # one rank speaks, of its own share
    assert (tmp_path / "log").read_text().count("mined negatives") == 1


def test_messages_before_anything_starts(tmp_path: Path) -> None:
    def run(*arguments: str, **environ: str) -> tuple[int, str]:
        done = run_script("mine.sh", *arguments, **environ)
        return done.returncode, done.stderr

    code, text = run(SLURM_SUBMIT_DIR=str(ROOT))
    assert code == 2
    assert text.startswith(
        "slurm/mine.sh: the arguments of `megam3 mine` are required: sbatch slurm/mine.sh FILE"
    )
    code, text = run("x", SLURM_SUBMIT_DIR=str(ROOT), MEGAM3_VENV=str(tmp_path))
    assert code == 2
    assert f"no {tmp_path}/bin/python: run make once, or set MEGAM3_VENV" in text
    assert "run this with sbatch" in run("x")[1]
