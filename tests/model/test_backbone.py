"""Encoders that cannot run packed are refused before their weights load; weights that do not fit are errors,
not log lines."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from megam3.errors import CheckpointError, ConfigError
from megam3.model.backbone import build_backbone, first_position, load_backbone, max_text_tokens
from tests.factory import make_tiny_model_folder, tiny_config


def change_config(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def change_weights(folder, change):
    file = folder / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["distilbert", "t5", "gemma2", "gpt2", "deberta-v2"])
def test_other_families_are_refused_without_their_weights(tmp_path, family):
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=rf"is a '{family}' model, which does not run on packed texts.*xlm-roberta"
    ) as caught:
        load_backbone(str(tmp_path))
    assert caught.value.what == "model.path"


@pytest.mark.parametrize("field", ["is_decoder", "add_cross_attention"])
def test_decoders_are_refused(field):
    config = tiny_config(100)
    setattr(config, field, True)
    with pytest.raises(
        ConfigError, match="configured as a decoder; retrieval needs attention in both directions"
    ):
        build_backbone(config)


def test_relative_positions_are_refused():
    config = tiny_config(100)
    config.position_embedding_type = "relative_key"
    with pytest.raises(ConfigError, match="position_embedding_type 'relative_key'.*use absolute positions"):
        build_backbone(config)


def test_a_folder_without_config_is_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match="holds no readable config.json.*give a Hugging Face encoder folder"
    ):
        load_backbone(str(tmp_path))


def test_a_folder_without_weights_is_refused(tmp_path):
    tiny_config(100).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the encoder's weights cannot be loaded"):
        load_backbone(str(tmp_path))


def test_missing_weights_are_an_error(tmp_path):
    folder = make_tiny_model_folder(tmp_path)
    change_weights(folder, lambda weights: weights.pop("encoder.layer.1.output.dense.bias"))
    with pytest.raises(
        CheckpointError,
        match=r"the weight file misses encoder\.layer\.1\.output\.dense\.bias.*config.json that belongs",
    ):
        load_backbone(str(folder))


def test_more_layers_than_the_config_says_are_an_error(tmp_path):
    folder = make_tiny_model_folder(tmp_path)
    change_config(folder, num_hidden_layers=1)
    with pytest.raises(
        CheckpointError, match=r"holds what its config has not: encoder\.layer\.1\..* and 13 more"
    ):
        load_backbone(str(folder))


def test_other_shapes_than_the_config_says_are_an_error(tmp_path):
    folder = make_tiny_model_folder(tmp_path)
    change_config(folder, vocab_size=99)
    with pytest.raises(CheckpointError, match="model.path"):
        load_backbone(str(folder))


def test_loading_drops_the_pooler_and_overrides_dropout(tmp_path, capfd):
    folder = make_tiny_model_folder(tmp_path, dropout=0.1)
    encoder = load_backbone(str(folder), hidden_dropout=0.0, attention_dropout=0.3)
    assert encoder.pooler is None
    assert encoder.encoder.layer[0].attention.self.dropout.p == 0.3
    assert encoder.encoder.layer[0].output.dropout.p == encoder.embeddings.dropout.p == 0.0
    assert load_backbone(str(folder)).encoder.layer[0].output.dropout.p == 0.1
    assert "Loading weights" not in capfd.readouterr().err
    published = AutoModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, published[name]) for name, tensor in encoder.state_dict().items())


def test_weights_saved_from_a_language_model_load(tmp_path):
    """Keys with the `roberta.` prefix and a language-model head, as published checkpoints often have them."""
    folder = make_tiny_model_folder(tmp_path)

    def as_language_model(weights):
        for name in list(weights):
            weights[f"roberta.{name}"] = weights.pop(name)
        weights["lm_head.bias"] = torch.zeros(5)

    plain = load_backbone(str(folder)).state_dict()
    change_weights(folder, as_language_model)
    assert all(
        torch.equal(tensor, plain[name]) for name, tensor in load_backbone(str(folder)).state_dict().items()
    )


def test_positions_start_after_the_padding_id_in_the_roberta_families():
    assert first_position(tiny_config(100)) == 2
    assert max_text_tokens(tiny_config(100, max_tokens=512)) == 512
    assert first_position(AutoConfig.for_model("bert")) == 0
    assert max_text_tokens(AutoConfig.for_model("bert", max_position_embeddings=512)) == 512
