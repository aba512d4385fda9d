"""Pooling and direction of a folder and a recipe: what is taken, and what is refused before a device is
touched."""

import json

import pytest

from megam3.config.check import model_folder
from megam3.errors import ConfigError
from megam3.reading import Reading, resolve_reading, turn_encoder
from tests.recipes import make_config, write_encoder_config

XLM_R, QWEN3 = {"model_type": "xlm-roberta"}, {"model_type": "qwen3"}


def write_pooling(folder, config):
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(config))
    modules = [{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]
    (folder / "modules.json").write_text(json.dumps(modules))


def test_a_silent_folder_reads_the_first_token_or_causal_the_last(tmp_path):
    assert resolve_reading(str(tmp_path), XLM_R) == Reading(pooling="cls", cls_every_tokens=256)
    assert resolve_reading(str(tmp_path), QWEN3).pooling == "last"
    assert resolve_reading(str(tmp_path), QWEN3, attention="bidirectional").pooling == "cls"


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
def test_a_folder_of_sentence_transformers_is_trained_as_it_pools(tmp_path, config, pooling):
    """e5 and gte: mean; Qwen3-Embedding: last."""
    write_pooling(tmp_path, config)
    assert resolve_reading(str(tmp_path), XLM_R).pooling == pooling
    assert resolve_reading(str(tmp_path), XLM_R, pooling="cls").pooling == "cls"


def test_a_folders_own_word_comes_first(tmp_path):
    write_pooling(tmp_path, {"pooling_mode": "cls"})
    own = {"pooling": "mcls", "cls_every_tokens": 64}
    (tmp_path / "megam3_config.json").write_text(json.dumps(own))
    assert resolve_reading(str(tmp_path), XLM_R) == Reading(pooling="mcls", cls_every_tokens=64)


def test_a_pooling_that_is_not_here_is_named(tmp_path):
    write_pooling(tmp_path, {"pooling_mode": "max"})
    with pytest.raises(
        ConfigError, match="pools its dense vector by 'max', which megam3 does not do; choose one"
    ):
        resolve_reading(str(tmp_path), XLM_R)
    assert resolve_reading(str(tmp_path), XLM_R, pooling="mean").pooling == "mean"


@pytest.mark.parametrize("pooling", ["cls", "mcls"])
def test_the_first_token_of_a_left_to_right_model_knows_nothing(tmp_path, pooling):
    with pytest.raises(
        ConfigError, match="first token sees itself alone; use last or mean, or set model.attention"
    ):
        resolve_reading(str(tmp_path), QWEN3, pooling=pooling)
    assert (
        resolve_reading(str(tmp_path), QWEN3, pooling=pooling, attention="bidirectional").pooling == pooling
    )


def test_an_interval_needs_mcls(tmp_path):
    with pytest.raises(ConfigError, match="model.cls_every_tokens = 128.*the pooling is mean; leave it out"):
        resolve_reading(str(tmp_path), XLM_R, pooling="mean", cls_every_tokens=128)


@pytest.mark.parametrize("attention", ["causal", "bidirectional"])
def test_turning_says_it_in_the_field_of_the_family(attention):
    causal = attention == "causal"
    assert turn_encoder({"model_type": "llama"}, attention)["is_causal"] is causal
    assert turn_encoder({"model_type": "gemma3_text"}, attention)["use_bidirectional_attention"] is not causal
    assert turn_encoder(XLM_R, attention) == XLM_R


def problems(folder, **model):
    fields = {f"model__{name}": value for name, value in model.items()}
    return "\n".join(map(str, model_folder(make_config(model__path=str(folder), **fields))))


def test_the_checks_of_a_recipe_say_it_too(tmp_path):
    folder = write_encoder_config(tmp_path / "encoder")
    assert "model.attention = 'causal': " in problems(folder, attention="causal")
    assert "reads in both directions only" in problems(folder, attention="causal")
    # 8192 positions hold 31 groups of 256 tokens with one <s> more each, and 225 tokens
    assert "positions for 8161 tokens" in problems(folder, pooling="mcls")
    assert "positions for" not in problems(folder, pooling="mean")
    decoder = write_encoder_config(tmp_path / "decoder", model_type="qwen3")
    assert "the first token sees itself alone" in problems(decoder, pooling="cls")
    assert "model.pooling" not in problems(decoder)
