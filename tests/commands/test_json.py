"""What commands print as tables, for programs: the same numbers, and nothing else on standard output."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megam3.cli import SUBCOMMANDS, main
from megam3.config.load import load_config
from tests.docs.blocks import ROOT
from tests.factory import make_sentences, make_tiny_model_folder


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A recipe on the command line that could be trained."""
    folder = tmp_path_factory.mktemp("json")
    make_tiny_model_folder(folder / "model", max_tokens=512)
    texts = make_sentences(40, seed=1)
    records = [{"query": a, "pos": [b], "lang": "sw"} for a, b in zip(texts[:20], texts[20:], strict=True)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return [
        "finetune",
        f"model.path={folder}/model",
        f"data.train.0.paths=[{folder}/pairs.jsonl]",
        f"data.store_dir={folder}/store",
        "data.batch.global_queries=8",
    ]


def answer(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> Any:
    assert main(list(argv)) == code
    return json.loads(capsys.readouterr().out)


def test_show_config(capsys: pytest.CaptureFixture[str], recipe: list[str]) -> None:
    facts = answer(capsys, "show-config", *recipe, "--json", "--world-size", "2")
    assert facts["recipe"] == load_config(recipe[0], recipe[1:]).model_dump(mode="json")
    assert facts["engine_choice"] is None
    assert [row["queries_per_rank"] for row in facts["batch"]] == [4] * len(facts["batch"])
    assert facts["deepspeed"]["zero_optimization"]["stage"] == 2
    assert facts["weights"]["losses"]["lexical"] == 0.1
    auto = answer(capsys, "show-config", *recipe, "--json", "engine.template=auto")
    assert auto["engine_choice"]["fields"]["template"] == auto["recipe"]["engine"]["template"] == "zero0"
    # what is wrong is said as ever, after the document
    assert main(["show-config", *recipe, "--json", "--world-size", "3"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ranks"] == 3
    assert "data.batch.global_queries = 8: 3 ranks must share" in captured.err


def test_plan_memory(capsys: pytest.CaptureFixture[str], recipe: list[str]) -> None:
    facts = answer(capsys, "plan-memory", *recipe, "--json", "engine.template=zero1")
    held = facts["bytes"]
    assert held["peak"] == sum(size for name, size in held.items() if name != "peak")
    assert (facts["template"], facts["ranks"], facts["fits"]) == ("zero1", 1, True)
    assert all(each["peak_bytes"] <= facts["limit_bytes"] for each in facts["fastest"])
    assert facts["step"]["num_queries"] == 8
    too_small = ["--gpu-memory", "0.0001", "--reserve", "0"]
    assert not answer(capsys, "plan-memory", *recipe, "--json", "engine.template=zero1", *too_small, code=1)[
        "fits"
    ]


def test_plan_epochs(capsys: pytest.CaptureFixture[str], recipe: list[str]) -> None:
    facts = answer(capsys, "plan-epochs", *recipe, "--json")
    assert facts["queries_by_language"] == {"sw": 20}
    assert (facts["queries"], facts["ranks"]) == (20, 1)
    assert 0 <= facts["padding_avoided"] < 1


def test_prepare(capsys: pytest.CaptureFixture[str], recipe: list[str], tmp_path: Path) -> None:
    own = [*recipe, f"data.store_dir={tmp_path}/store"]
    facts = answer(capsys, "prepare", *own, "--json", "--processes", "1")
    assert facts["store"] == str(tmp_path / "store")
    assert Path(facts["picture"]).is_file()
    assert facts["datasets_waiting"] == 0
    (dataset,) = facts["datasets"]
    assert (dataset["rows"], dataset["texts"], dataset["rejected"]) == (20, 40, 0)
    assert dataset["languages"] == {"sw": {"rows": 20, "tokens": dataset["tokens"]}}
    assert sum(bar["records"] for bar in dataset["length_histogram"]) == 20
    verified = answer(capsys, "prepare", *own, "--json", "--verify")["verified"]
    assert verified == [{"name": dataset["name"], "shards": dataset["shards"]}]


def test_prepare_by_a_task_that_others_must_finish(
    capsys: pytest.CaptureFixture[str], recipe: list[str], tmp_path: Path
) -> None:
    records = "".join(json.dumps({"query": "a " * 99, "pos": ["b " * 999]}) + "\n" for _ in range(1000))
    (tmp_path / "large.jsonl").write_text(records)
    own = [*recipe, f"data.store_dir={tmp_path}/store", f"data.train.0.paths=[{tmp_path}/large.jsonl]"]
    shard = ["--shard", "0/2", "--unit-mb", "1", "--processes", "1"]
    facts = answer(capsys, "prepare", *own, "--json", *shard)
    assert (facts["datasets"], facts["datasets_waiting"], facts["picture"]) == ([], 1, None)


def test_inspect_batch(capsys: pytest.CaptureFixture[str], recipe: list[str]) -> None:
    facts = answer(capsys, "inspect-batch", *recipe, "--json", "--step", "1", "--world-size", "2")
    assert (facts["step"], facts["rank"], facts["ranks"], facts["left_out"]) == (1, 0, 2, [])
    (batch,) = facts["batches"]
    assert (batch["epoch"], batch["batch"]) == (0, 1)
    assert len(batch["share"]) == batch["queries"] // 2
    for group in batch["share"]:
        file, number = group["source"].rsplit(":", 1)
        record = json.loads(Path(file).read_text().splitlines()[int(number) - 1])
        (passage,) = group["passages"]
        assert group["query"]["text"].split() == record["query"].lower().split()
        assert (passage["kind"], "teacher_score" in passage) == ("positive", False)
        assert passage["tokens"] > 2


def test_inspect_batch_with_several_positives_and_scores(
    capsys: pytest.CaptureFixture[str], recipe: list[str], tmp_path: Path
) -> None:
    record = {"query": "which", "pos": ["good one", "good two"], "neg": ["bad one"]}
    record |= {"pos_scores": [3.0, 2.0], "neg_scores": [1.0]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record) + "\n")
    own = [*recipe, f"data.train.0.paths=[{tmp_path}/pairs.jsonl]", f"data.store_dir={tmp_path}/store"]
    own += ["data.positives_per_query=2", "data.batch.global_queries=1", "data.passages_per_query=2"]
    (batch,) = answer(capsys, "inspect-batch", *own, "--json")["batches"]
    (group,) = batch["share"]
    found = [(each["kind"], each["teacher_score"]) for each in group["passages"]]
    assert found == [("positive", 3.0), ("positive", 2.0), ("negative", 1.0)]
    assert main(["inspect-batch", *own]) == 0
    said = capsys.readouterr().out
    assert said.count("  positive (teacher ") == 2
    assert "  negative (teacher 1.000) " in said


def test_inspect_batch_of_texts(
    capsys: pytest.CaptureFixture[str], recipe: list[str], tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "text {n}"}}\n' for n in range(4)))
    own = ["pretrain", recipe[1], f"data.train.0.paths=[{tmp_path}/texts.jsonl]"]
    own += [f"data.store_dir={tmp_path}/store", "data.pack_texts_tokens=512"]
    own += ["data.batch.global_tokens=null", "data.batch.global_queries=4"]
    (batch,) = answer(capsys, "inspect-batch", *own, "--json")["batches"]
    documents = [document for each in batch["share"] for document in each["documents"]]
    assert sorted(document["row"] for document in documents) == [0, 1, 2, 3]
    assert all(each["sequence"]["tokens"] > 0 for each in batch["share"])


def pipeline_file(folder: Path, *stages: str) -> str:
    lines = "".join(
        f"  - {{name: {name}, command: import, arguments: '{given}'}}\n"
        for name, given in (stage.split(": ") for stage in stages)
    )
    path = folder / "pipeline.yaml"
    path.write_text(f"folder: {folder}/out\nstages:\n{lines}")
    return str(path)


def test_pipeline_that_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    facts = answer(capsys, "pipeline", pipeline_file(tmp_path, "first: x {output}"), "--check", "--json")
    stage = {"name": "first", "command": "import", "arguments": ["x", "{output}"]}
    assert facts == {"folder": f"{tmp_path}/out", "stages": [stage]}


def test_pipeline(tmp_path: Path) -> None:
    """In a process of its own, because libraries that it loads may print; tests/test_pipeline.py reads the
    figures of stages that finished."""
    path = pipeline_file(tmp_path, "first: /no/such {output}")
    command = [sys.executable, "-m", "megam3", "pipeline", path, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "80"})
    assert done.returncode == 2
    assert "stage = 'first': failed and said last" in done.stderr
    assert "first: megam3 import /no/such" in done.stderr
    facts = json.loads(done.stdout)
    (first,) = facts["stages"]
    assert facts["folder"] == f"{tmp_path}/out"
    assert (first["name"], first["command"], first["status"]) == ("first", "import", "failed")
    assert (first["exit_code"], first["figures"], first["output"]) == (2, {}, f"{tmp_path}/out/first/output")
    assert "/no/such" in Path(first["log"]).read_text()


def test_the_page_names_every_command_that_has_it() -> None:
    def knows_json(command: str) -> bool:
        source = ROOT / f"{SUBCOMMANDS[command].module.replace('.', '/')}.py"
        return '"--json"' in source.read_text()

    page = (ROOT / "docs/getting-started.md").read_text()
    (sentence,) = re.findall(r"^`--json` is understood by (.*)$", page, re.MULTILINE)
    assert set(re.findall(r"`([a-z-]+)`", sentence)) == set(filter(knows_json, SUBCOMMANDS))


@pytest.mark.parametrize("name", ["evaluate", "inspect-batch"])
def test_standard_output_is_the_commands_alone(name: str) -> None:
    """In a process of its own, where nothing has loaded DeepSpeed yet."""
    environ = {key: value for key, value in os.environ.items() if key != "DS_ACCELERATOR"}
    said = subprocess.run(
        [sys.executable, "-m", "megam3", name, "--help"],
        env={**environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.startswith("usage: megam3")
