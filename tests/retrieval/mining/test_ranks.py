"""Two ranks mine what one mines; a rank that finds bad input ends the other one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megam3.dist.env import free_port
from tests.data.pairs import write_jsonl
from tests.factory import make_sentences, make_tiny_model_folder

ROOT = Path(__file__).resolve().parents[3]
# small parts and shards, so that both ranks have several of each
START = """
import sys
from megam3.retrieval.index import build
from megam3.retrieval.mining import run
build.MAX_SHARD_PASSAGES, run.PART_BYTES = 16, 600
from megam3.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(place, output, rank=0, ranks=1, port=0):
    environ = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1")
    environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "MASTER_PORT": str(port),
    }
    arguments = [
        "mine",
        str(place / "pairs.jsonl"),
        "--model",
        str(place / "model"),
        "--output",
        str(place / output),
    ]
    arguments += [
        "--corpus",
        str(place / "corpus.jsonl"),
        "--candidates",
        "sum",
        "--range",
        "0-50",
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-c", START, *arguments, "--negatives", "5"]
    return subprocess.Popen(
        command, env=environ, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_two(place, output):
    port = free_port()
    both = [start(place, output, rank, 2, port) for rank in range(2)]
    try:
        said = [process.communicate(timeout=600) for process in both]
    finally:
        for process in both:
            process.kill()
    return [process.returncode for process in both], said


@pytest.mark.ranks
def test_two_ranks_mine_what_one_mines(tmp_path):
    make_tiny_model_folder(tmp_path / "model", max_tokens=64)
    sentences = make_sentences(70, seed=3)
    records = [{"query": sentences[n][:30], "pos": [sentences[n + 1]]} for n in range(40)]
    write_jsonl(tmp_path / "pairs.jsonl", records)
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in sentences])
    alone = start(tmp_path, "alone.jsonl", port=free_port())
    _, errors = alone.communicate(timeout=600)
    assert alone.returncode == 0, errors
    codes, said = run_two(tmp_path, "both.jsonl")
    assert codes == [0, 0], said
    assert (tmp_path / "both.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()
    reports = [json.loads((tmp_path / f"{name}.jsonl.report.json").read_text()) for name in ("alone", "both")]
    for report in reports:
        del report["output"], report["mean_positive_score"], report["mean_negative_score"]
    assert reports[0] == reports[1]
    assert "mined negatives" in said[0][0]
    assert said[1][0] == ""

    write_jsonl(tmp_path / "pairs.jsonl", [{"query": "a"}])
    codes, said = run_two(tmp_path, "bad.jsonl")
    assert codes == [2, 1], said
    assert "pairs.jsonl:1 pos = None: must hold at least one passage" in said[0][1]
    assert "rank 1: another rank has ended; its own message says why" in said[1][1]
