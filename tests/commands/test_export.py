"""The command line of `megam3 export`: what it prints, and how it ends; the weights come from memory here."""

import pytest

from megam3.cli import report_user_errors
from megam3.commands import export
from megam3.config.schema import ModelConfig
from megam3.model.pretrained import load_m3
from tests.factory import make_tiny_model_folder


@pytest.fixture
def source(tmp_path, monkeypatch):
    folder = make_tiny_model_folder(tmp_path / "source", max_tokens=64)
    state = load_m3(str(folder), ModelConfig(path=str(folder))).state_dict()
    monkeypatch.setattr(export, "consolidated_weights", lambda checkpoint: state)
    return folder


def test_it_prints_the_largest_difference_of_every_head(source, tmp_path, capsys):
    assert export.main([str(tmp_path / "step"), str(tmp_path / "out"), "--model", str(source)]) == 0
    printed = capsys.readouterr().out
    for head in ("dense", "lexical", "multi_vector"):
        assert f"largest difference, {head} head: " in printed
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_user_error_is_one_line_and_exit_code_2(source, tmp_path, capsys):
    assert report_user_errors(export.main, [str(tmp_path / "step"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "name a checkpoint folder, or the model's folder with --model" in error
    assert len(error.splitlines()) == 1
