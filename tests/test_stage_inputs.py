"""What a stage is given by the one before, or by a user, and cannot work with: one message each, before
anything long begins. Tests of single readers stand beside them (records, BEIR folders, pipeline files)."""

import json
import shutil
from pathlib import Path

import pytest

from megam3.cli import main
from tests.data.pairs import write_jsonl
from tests.factory import make_sentences, make_tiny_model_folder, write_tiny_tokenizer

TEXTS = make_sentences(20, seed=4)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    make_tiny_model_folder(tmp_path / "model", max_tokens=64, vocab_size=300)
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in TEXTS])
    write_jsonl(tmp_path / "pairs.jsonl", [{"query": TEXTS[0], "pos": [TEXTS[1]], "neg": [TEXTS[2]]}])
    return tmp_path


def mine(place: Path, *more: str) -> int:
    files = [
        str(place / "pairs.jsonl"),
        "--corpus",
        str(place / "corpus.jsonl"),
        "--model",
        str(place / "model"),
    ]
    return main(["mine", *files, "--output", str(place / "out.jsonl"), "--device", "cpu", *more])


def take_another_tokenizer(place: Path) -> None:
    write_tiny_tokenizer(place / "other", vocab_size=600, max_tokens=64)
    for file in (place / "other").iterdir():
        shutil.copyfile(file, place / "model" / file.name)


@pytest.mark.parametrize("command", ["mine", "search", "add-teacher-scores", "train"])
def test_a_model_with_another_models_tokenizer(
    place: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    take_another_tokenizer(place)
    recipe = place / "recipe.yaml"
    recipe.write_text(
        f"name: run\noutput_dir: {place}/runs\nmodel: {{path: {place}/model}}\n"
        f'data: {{train: [{{name: pairs, paths: ["{place}/pairs.jsonl"]}}], batch: {{global_queries: 1}},'
        " query_max_tokens: 32, passage_max_tokens: 32, passages_per_query: 2}\n"
        "optim: {lr: 1.0e-3}\ntrain: {steps: 1}\n"
    )
    pairs, model = str(place / "pairs.jsonl"), str(place / "model")
    codes = {
        "mine": lambda: mine(place, "--range", "1-10"),
        "search": lambda: main(["search", model, str(place / "corpus.jsonl"), "--query", "a"]),
        "add-teacher-scores": lambda: main(
            ["add-teacher-scores", pairs, str(place / "scored.jsonl"), "--model", model, "--device", "cpu"]
        ),
        "train": lambda: main(["train", str(recipe)]),
    }
    assert codes[command]() == 2
    said = capsys.readouterr().err
    assert "tokens, the model's embedding" in said
    assert "use the tokenizer the encoder was trained with" in said
    assert not (place / "out.jsonl.work").exists()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": "a", "pos": []}, "pos = []: must hold at least one passage"),
        ({"query": "a"}, "pos = None: must hold at least one passage"),
        (
            {"query": "a", "pos": ["b"], "neg": ["c"], "pos_scores": [1.0], "neg_scores": [0.1, 0.2]},
            "neg_scores = [0.1, 0.2]: must hold 1 teacher scores, one for each of `neg`",
        ),
    ],
)
def test_records_that_a_stage_cannot_use_name_file_and_line(
    place: Path, capsys: pytest.CaptureFixture[str], record: dict, message: str
) -> None:
    with (place / "pairs.jsonl").open("a") as stream:
        stream.write(json.dumps(record) + "\n")
    assert mine(place, "--range", "1-10") == 2
    said = capsys.readouterr().err
    assert "pairs.jsonl:2" in said
    assert message in said


def test_fewer_candidates_than_asked_are_counted_in_the_report(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mine(place, "--range", "1-10", "--negatives", "12") == 0
    assert "queries with fewer than asked" in capsys.readouterr().out
    report = json.loads((place / "out.jsonl.report.json").read_text())
    assert report["queries_with_fewer_than_asked"] == 1
    assert 1 <= report["negatives"] < 12
