"""Models of others become folders that load_m3 reads with the same weights."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from megam3.commands import import_model as command
from megam3.config.schema import ModelConfig
from megam3.embedder import M3Embedder
from megam3.errors import CheckpointError, ConfigError
from megam3.export.imported import import_model, read_pooling
from megam3.model.pretrained import load_m3
from tests.factory import make_tiny_model_folder


@pytest.fixture
def source(tmp_path):
    return make_tiny_model_folder(tmp_path / "source", max_tokens=64)


def load(folder, **fields):
    return load_m3(str(folder), ModelConfig(path=str(folder), **fields))


def test_fp16_heads_are_read(source, tmp_path):
    for name in ("colbert_linear.pt", "sparse_linear.pt"):
        state = torch.load(source / name, weights_only=True)
        torch.save({key: value.half() for key, value in state.items()}, source / name)
    assert import_model(str(source), tmp_path / "out").heads == ("lexical", "multi_vector")
    wanted, got = load(source).state_dict(), load(tmp_path / "out").state_dict()
    assert all(torch.equal(got[name], wanted[name]) and got[name].dtype == torch.float32 for name in wanted)


def test_a_checkpoint_of_flagembeddings_trainer_loses_its_prefix(source, tmp_path):
    wanted = load(source).state_dict()
    weights = load_file(source / "model.safetensors")
    save_file({f"model.{key}": value for key, value in weights.items()}, source / "model.safetensors")
    assert import_model(str(source), tmp_path / "out").stripped_prefix
    got = load(tmp_path / "out").state_dict()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def test_the_command_says_what_is_missing_and_how_it_was_pooled(tmp_path, capsys):
    source = make_tiny_model_folder(tmp_path / "source", max_tokens=64, heads=False)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    modules = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (source / "modules.json").write_text(json.dumps(modules))
    assert command.main([str(source), str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "no weights for lexical, multi_vector: train with model.missing_heads=init" in said
    assert "pooled by 'mean', and training goes on so" in said
    load(tmp_path / "out", missing_heads="init")


def test_new_heads_are_those_that_training_starts_and_old_ones_stay(source, tmp_path, capsys):
    (source / "sparse_linear.pt").unlink()
    assert command.main([str(source), str(tmp_path / "out"), "--new-heads"]) == 0
    assert "the others were written" in capsys.readouterr().out
    wanted, got = load(source, missing_heads="init").state_dict(), load(tmp_path / "out").state_dict()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"embedding_dimension": 8, "pooling_mode": "cls"}, "cls"),
        ({"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}, "cls+max"),
    ],
)
def test_both_styles_of_pooling(tmp_path, config, name):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "config.json").write_text(json.dumps(config))
    (tmp_path / "modules.json").write_text(json.dumps([{"path": "p", "type": "a.b.Pooling"}]))
    assert read_pooling(tmp_path) == name


def test_heads_that_zero_3_left_empty_are_refused(source, tmp_path):
    torch.save({"weight": torch.zeros(0), "bias": torch.zeros(0)}, source / "colbert_linear.pt")
    with pytest.raises(CheckpointError, match=r"weight has shape \(0,\), the encoder needs \(0, 32\)"):
        import_model(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_incomplete_and_missing_weights_are_refused(source, tmp_path):
    index = {"weight_map": {"lost.weight": "model-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is incomplete: .* names lost.weight"):
        import_model(str(source), tmp_path / "out")
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither model.*safetensors nor pytorch_model"):
        import_model(str(source), tmp_path / "out")


def test_a_damaged_file_and_a_family_that_is_not_served_are_refused(source, tmp_path):
    (source / "sparse_linear.pt").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="cannot be read as a head .*remove it to start this head"):
        import_model(str(source), tmp_path / "out")
    (source / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(ConfigError, match="is a 't5' model"):
        import_model(str(source), tmp_path / "out")


def test_layers_behind_the_pooling_are_told_and_not_served(tmp_path):
    """As EmbeddingGemma's: pooling, two layers, normalisation."""
    source = make_tiny_model_folder(tmp_path / "source", max_tokens=64, heads=False)
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Dense": "Dense", "3_Dense": "Dense"}
    for place in list(kinds)[1:]:
        (source / place).mkdir()
        (source / place / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    modules = [{"path": path, "type": f"sentence_transformers.models.{kind}"} for path, kind in kinds.items()]
    (source / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(
        CheckpointError, match="puts its dense vector through 2_Dense, 3_Dense, which megam3 does"
    ):
        M3Embedder(source, device="cpu")
    notes = " ".join(import_model(str(source), tmp_path / "out").notes())
    assert "went through 2_Dense, 3_Dense, which megam3 has no place for" in notes
    assert M3Embedder(tmp_path / "out", device="cpu").model.reading.pooling == "mean"


@pytest.mark.parametrize("modules", ['{"0": "Dense"}', '[{"type": "models.Dense"}]', "[1]"])
def test_a_damaged_list_of_modules_is_one_message(tmp_path, modules):
    source = make_tiny_model_folder(tmp_path / "source", max_tokens=64)
    (source / "modules.json").write_text(modules)
    with pytest.raises(CheckpointError, match=r"modules\.json': names layers that cannot be read .*copy the"):
        M3Embedder(source, device="cpu")
