"""slurm/prepare.sh on a real two-node Slurm: an array whose tasks share one store."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megam3.config.load import load_config
from megam3.data.prepare import prepare_data
from megam3.data.tokenizer import load_tokenizer
from tests.data.pairs import write_jsonl
from tests.factory import make_sentences
from tests.launches import Workplace, make_workplace
from tests.slurm.scripts import ROOT, run_script
from tests.slurm_cluster import Cluster, missing_for_slurm

needs_slurm = pytest.mark.skipif(bool(missing_for_slurm()), reason=missing_for_slurm() or "Slurm is here")


def submit(cluster: Cluster, out: Path, array: str, *arguments: str) -> str:
    environ = {**cluster.environ, "PYTHONPATH": str(ROOT), "MEGAM3_VENV": sys.prefix}
    command = [
        "sbatch",
        "--chdir",
        str(ROOT),
        "--array",
        array,
        "--output",
        str(out / "task-%a.log"),
        "slurm/prepare.sh",
        *arguments,
    ]
    done = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=True)
    found = re.search(r"\d+", done.stdout)
    assert found
    return found.group()


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    """As `make_workplace`, with 5 MB of pairs: five units of a megabyte."""
    made = make_workplace(tmp_path / "place")
    sentences = make_sentences(200, min_words=60, max_words=60)
    records = [
        {
            "query": f"{n} {sentences[n % 200][:40]}",
            "pos": [" ".join(sentences[(n + k) % 200] for k in range(8))],
        }
        for n in range(1500)
    ]
    assert 4.2e6 < write_jsonl(made.folder / "pairs.jsonl", records).stat().st_size < 5.2e6
    return made


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store but the picture."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.suffix != ".png"
    }


@needs_slurm
@pytest.mark.slurm
def test_the_tasks_of_an_array_make_the_store_of_one_process(
    cluster: Cluster, tmp_path: Path, place: Workplace
) -> None:
    # neither from 0 nor one by one: tasks 3, 5 and 7 are shards 0, 1 and 2 of 3
    job = submit(cluster, tmp_path, "3-7:2", place.recipe, "--unit-mb", "1")
    for task in (3, 5, 7):
        fields = cluster.wait_for(f"{job}_{task}", "COMPLETED", "FAILED")
        assert fields["ExitCode"] == "0:0", (tmp_path / f"task-{task}.log").read_text()
    logs = [(tmp_path / f"task-{task}.log").read_text() for task in (3, 5, 7)]
    assert [log.count("pairs: unit ") for log in logs] == [2, 2, 1]
    assert sum("pairs: 1,500 records" in log for log in logs) >= 1
    picture = place.folder / "store" / "lengths.png"
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

    config = load_config(place.recipe, [])
    prepare_data(config.data, load_tokenizer(config.model.path), tmp_path / "alone", unit_bytes=1 << 20)
    assert contents(place.folder / "store") == contents(tmp_path / "alone")


def test_messages_before_anything_starts(tmp_path: Path) -> None:
    def run(*arguments: str, **environ: str) -> tuple[int, str]:
        done = run_script("prepare.sh", *arguments, **environ)
        return done.returncode, done.stderr

    usage = (
        "slurm/prepare.sh: a recipe is required: sbatch --array=0-15 slurm/prepare.sh RECIPE [key=value…]\n"
    )
    assert run(SLURM_SUBMIT_DIR=str(ROOT)) == (2, usage)
    code, text = run("x", SLURM_SUBMIT_DIR=str(ROOT), MEGAM3_VENV=str(tmp_path))
    assert code == 2
    assert f"no {tmp_path}/bin/python: run make once, or set MEGAM3_VENV" in text
    assert "run this with sbatch" in run("x")[1]
