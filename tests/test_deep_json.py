"""JSON of a hundred thousand brackets, wherever a file from elsewhere is read: an error that names the file,
never a traceback of the parser's stack."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from megam3.checkpoint.find import read_state
from megam3.config.deepspeed import build_deepspeed_config
from megam3.data.manifest import Manifest
from megam3.data.record import BadRecord, parse_line
from megam3.data.tokenizer import load_tokenizer
from megam3.encoders import read_encoder_config
from megam3.errors import UserError
from megam3.export.tokenizer_files import write_tokenizer_files
from megam3.files import parse_json
from megam3.model.backbone import load_backbone
from megam3.obs.lease import read_lease
from megam3.obs.metrics import read_metrics
from megam3.reading import read_pooling
from megam3.retrieval.beir import read_beir
from tests.factory import make_tiny_model_folder
from tests.recipes import make_config

DEEP = "[" * 100_000


def test_each_failure_is_a_value_error() -> None:
    for text in (DEEP, DEEP.replace("[", '{"a":'), "{", "\ud800"):
        with pytest.raises(ValueError, match=r"."):
            parse_json(text)
    assert parse_json('{"a": [1]}') == {"a": [1]}


CALLS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "config": ("config.json", lambda folder: read_encoder_config(str(folder))),
    "encoder": ("config.json", lambda folder: load_backbone(str(folder))),
    "modules": ("modules.json", read_pooling),
    "own file": ("megam3_config.json", read_pooling),
    "tokenizer": ("tokenizer.json", lambda folder: load_tokenizer(folder)),
    "tokenizer config": ("tokenizer_config.json", lambda folder: load_tokenizer(folder)),
    "special tokens": ("special_tokens_map.json", lambda folder: copied(folder)),
}


def copied(folder: Path) -> None:
    (folder / "out").mkdir()
    write_tokenizer_files(folder, folder / "out", 64)


@pytest.mark.parametrize("name", CALLS)
def test_files_of_a_model(tmp_path: Path, name: str) -> None:
    file, call = CALLS[name]
    make_tiny_model_folder(tmp_path / "model")
    (tmp_path / "model" / file).write_text(DEEP)
    with pytest.raises(UserError) as error:
        call(tmp_path / "model")
    assert str(tmp_path / "model") in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"path": "1_Pooling"}', "dict"), ('[{"path": 1, "type": "x"}]', "list"), ("[7]", "list")],
)
def test_modules_that_are_none(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(
        UserError, match=f"modules.json = '{said}': must be a list of objects with `path` and `type`; restore"
    ):
        read_pooling(tmp_path)


def test_data_and_stores(tmp_path: Path) -> None:
    with pytest.raises(BadRecord, match="is not valid JSON"):
        parse_line(DEEP.encode())
    (tmp_path / "manifest.json").write_text(DEEP)
    with pytest.raises(UserError, match="manifest.json': cannot be read .*is nested too deeply"):
        Manifest.read(tmp_path / "manifest.json")
    (tmp_path / "corpus.jsonl").write_text(DEEP)
    with pytest.raises(UserError, match=r"corpus.jsonl:1 = .*is not JSON \(is nested too deeply\)"):
        read_beir(tmp_path)
    (tmp_path / "t.json").write_text(DEEP)
    with pytest.raises(UserError, match="t.json = 'is nested too deeply': cannot be read"):
        build_deepspeed_config(make_config(engine__template=str(tmp_path / "t.json")), 1)


def test_files_of_a_run_cost_what_they_hold_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f"{json.dumps({'step': 1})}\n{DEEP}\n{json.dumps({'step': 2})}\n")
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    (tmp_path / "lease.json").write_text(DEEP)
    assert read_lease(tmp_path / "lease.json") is None
    (tmp_path / "state.json").write_text(DEEP)
    with pytest.raises(
        UserError, match=r"not one that this version of megam3 reads \(is nested too deeply\)"
    ):
        read_state(str(tmp_path), verify=False)
