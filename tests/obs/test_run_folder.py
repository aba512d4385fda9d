import os
from pathlib import Path

import pytest

from megam3.files import read_json
from megam3.obs.run_folder import describe_run_folder
from megam3.reading import read_pooling


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "encoder"
    folder.mkdir()
    for name in (
        "config.json",
        "tokenizer.json",
        "sentencepiece.bpe.model",
        "model.safetensors",
        "README.md",
    ):
        (folder / name).write_text(f"content of {name}")
    (folder / "elsewhere").write_text("a tokenizer kept elsewhere")
    (folder / "tokenizer_config.json").symlink_to("elsewhere")
    return folder


def describe(run: Path, model: Path, recipe: str = "name: سلام\n") -> Path:
    return describe_run_folder(
        run,
        recipe_text=recipe,
        ds_config={"zero_optimization": {"stage": 3}, "train_batch_size": 2},
        environment={"host": "node1"},
        model_path=model,
    )


def test_recipe_dictionary_environment_and_model_files_without_weights(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "runs" / "a"
    assert describe(run, model) == run / "model"
    assert (run / "recipe.yaml").read_text(encoding="utf-8") == "name: سلام\n"
    assert read_json(run / "ds_config.json") == {"zero_optimization": {"stage": 3}, "train_batch_size": 2}
    assert list(read_json(run / "ds_config.json")) == ["zero_optimization", "train_batch_size"]
    assert read_json(run / "env.json") == {"host": "node1"}
    assert sorted(os.listdir(run / "model")) == [
        "config.json",
        "sentencepiece.bpe.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    copied = run / "model" / "tokenizer_config.json"
    assert not copied.is_symlink()
    assert copied.read_text() == "a tokenizer kept elsewhere"


def test_written_again_it_holds_the_newer_and_no_left_over(tmp_path: Path, model: Path) -> None:
    run = tmp_path / "run"
    describe(run, model)
    (model / "config.json").write_text("another")
    describe(run, model, recipe="name: b\n")
    assert (run / "recipe.yaml").read_text() == "name: b\n"
    assert (run / "model" / "config.json").read_text() == "another"
    assert not list(run.rglob("*.tmp"))


def test_how_a_model_is_read_goes_into_every_checkpoint(tmp_path: Path, model: Path) -> None:
    """A run whose model came with mean pooling exports it so when that folder is gone."""
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (model / "1_Pooling" / "notes.txt").write_text("no model file")
    modules = '[{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]'
    (model / "modules.json").write_text(modules)
    kept = describe(tmp_path / "run", model)
    assert read_pooling(kept) == "mean"
    assert [file.name for file in (kept / "1_Pooling").iterdir()] == ["config.json"]
    (model / "megam3_config.json").write_text('{"pooling": "last"}')
    assert read_pooling(describe(tmp_path / "again", model)) == "last"
