"""Commands, recipes, data and Python of README and three pages are run as they stand, in their order.

Only the names of published models are replaced by folders of tiny ones, and what needs a launcher, a tracker,
a terminal or another model is left to tests/docs/test_commands.py.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megam3.cli import SUBCOMMANDS, main
from tests.docs.blocks import ROOT, commands, fences
from tests.factory import make_sentences, make_tiny_model_folder

README = ROOT / "README.md"
PAGES = [README, *(ROOT / f"docs/{name}.md" for name in ("getting-started", "data", "evaluation"))]
PUBLISHED = {"BAAI/bge-m3": "published/heads", "intfloat/multilingual-e5-base": "published/bare"}
NOT_RUN = ("megam3 quickstart", "megam3 add-teacher-scores")
WRITES = {"export": 2, "init-site": 1, "import": 2, "merge": 3}
"""Where among the arguments the folder stands that a subcommand makes."""
FLAGEMBEDDING = (
    "torchrun --nproc_per_node 2 -m FlagEmbedding.finetune.embedder.encoder_only.m3 "
    "--model_name_or_path start "
    "--train_data pairs.jsonl --output_dir out --train_group_size 4 --query_max_len 64 --passage_max_len 256 "
    "--per_device_train_batch_size 8 --num_train_epochs 1 --learning_rate 1e-5 --temperature 0.02\n"
)


def beir_folder(folder: Path, records: list[dict[str, object]]) -> None:
    (folder / "qrels").mkdir(parents=True)
    with (
        (folder / "corpus.jsonl").open("w", encoding="utf-8") as corpus,
        (folder / "queries.jsonl").open("w", encoding="utf-8") as queries,
        (folder / "qrels/test.tsv").open("w", encoding="utf-8") as qrels,
    ):
        qrels.write("query-id\tcorpus-id\tscore\n")
        for number, record in enumerate(records[:10]):
            texts = record["pos"]
            assert isinstance(texts, list)
            corpus.write(json.dumps({"_id": f"p{number}", "title": "", "text": texts[0]}) + "\n")
            queries.write(json.dumps({"_id": f"q{number}", "text": record["query"]}) + "\n")
            qrels.write(f"q{number}\tp{number}\t1\n")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the reader has it: README's data and recipe, a model for each published name."""
    folder = tmp_path_factory.mktemp("reader")
    (body,) = fences(README, "json")
    records = [json.loads(line) for line in body.splitlines()]
    texts = make_sentences(192, seed=5)
    records += [
        {"query": a, "pos": [f"{a} {b}"], "neg": [c, d]}
        for a, b, c, d in zip(texts[:48], texts[48:96], texts[96:144], texts[144:])
    ]
    (folder / "pairs.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in records), encoding="utf-8"
    )
    make_tiny_model_folder(folder / "published/heads", max_tokens=8192)
    make_tiny_model_folder(folder / "published/bare", heads=False, max_tokens=8192)
    for page in PAGES:
        for recipe in fences(page, "yaml"):
            name = re.match(r"name: (\w+)\n", recipe)
            if name:
                local = recipe.replace("BAAI/bge-m3", PUBLISHED["BAAI/bge-m3"])
                (folder / f"{name[1]}.yaml").write_text(local, encoding="utf-8")
    for name in ("corpus", "pages"):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[:96]]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "finetune.sh").write_text(FLAGEMBEDDING, encoding="utf-8")
    beir_folder(folder / "heldout", records)
    return folder


def run(line: str, folder: Path) -> None:
    for name, local in PUBLISHED.items():
        line = line.replace(name, local)
    _, *arguments = shlex.split(line, comments=True)
    # each page begins anew, and these refuse to write over what another page's lines have made
    if arguments[0] in WRITES:
        shutil.rmtree(arguments[WRITES[arguments[0]]], ignore_errors=True)
    if "--output" in arguments:
        Path(arguments[arguments.index("--output") + 1]).unlink(missing_ok=True)
    if arguments[0] == "train":
        # a process of its own: what DeepSpeed keeps of a run would meet the next one
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "megam3", *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    elif ">" in arguments:
        kept, target = arguments[: arguments.index(">")], arguments[arguments.index(">") + 1]
        with (folder / target).open("w", encoding="utf-8") as stream, contextlib.redirect_stdout(stream):
            assert main(kept) == 0, line
    else:
        assert main(arguments) == 0, line


def lines_of(page: Path) -> Iterator[str]:
    """Commands that run here as they stand."""
    for command in commands(page):
        line = command.line
        asks = line.startswith("megam3 search") and "--query" not in line  # at a terminal, or as a page
        if line.startswith("megam3 ") and not line.startswith(NOT_RUN) and not asks:
            yield line


@pytest.mark.slow
def test_pages_from_top_to_bottom(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    ran = set()
    for page in PAGES:
        for line in lines_of(page):
            if line.startswith("megam3 merge"):
                shutil.copytree("model", "trained", dirs_exist_ok=True)
            if "runs/second" in line:
                shutil.copytree("runs/first", "runs/second")
            run(line, workplace)
            ran.add(line.split()[1])
        # README's commands have made the folder "model" by here
        for code in fences(page, "python"):
            names: dict[str, Any] = {}
            exec(compile(code, page.name, "exec"), names)
            heads = {"dense", "lexical", "multi_vector", "sum"}
            assert names["embedder"].score(("a", "b")).keys() == heads
    # of the subcommands only these are not on those pages, or need a launcher, another model or a checkout
    assert set(SUBCOMMANDS) - ran <= {"quickstart", "extend-positions", "add-teacher-scores", "pipeline"}
    assert Path("runs/mine/report.html").is_file()
    assert Path("both.html").is_file()
    assert Path("site/slurm/train.sh").is_file()
    out = capsys.readouterr().out
    assert "Dense+Sparse" in out
    assert "BM25" in out
