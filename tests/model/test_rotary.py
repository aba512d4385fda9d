"""Rotary positions for longer texts: the angles against the paper's formulas, the folder as transformers
reads it, and what the tool refuses."""

import json
import math

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from megam3.cli import report_user_errors
from megam3.commands.extend_positions import main
from megam3.errors import CheckpointError, ConfigError
from megam3.model.backbone import load_backbone, load_encoder_config
from megam3.model.rotary import ntk_theta, scale_folder
from tests.factory import make_tiny_model_folder
from tests.families import make_family_folder
from tests.model.test_attention import norms_in_own_dtype
from tests.model.test_real_configs import compare


def angles(folder, kind=None):
    """Radians a position of each pair of a head, as transformers computes them from the folder."""
    encoder = AutoModel.from_pretrained(folder)
    name = "rotary_emb.inv_freq" if kind is None else f"rotary_emb.{kind}_inv_freq"
    return dict(encoder.named_buffers())[name].double()


def test_ntk_keeps_the_fastest_pair_and_slows_the_last_by_the_scale(tmp_path):
    source = make_family_folder(tmp_path / "short", "eurobert")
    assert scale_folder(source, tmp_path / "long", 2048, "ntk") == (512, 2048)
    before, after = angles(source), angles(tmp_path / "long")
    ratio = before / after
    assert ratio[0] == 1
    assert ratio[-1].item() == pytest.approx(4, rel=1e-6)
    assert (ratio.diff() > 0).all()
    assert ntk_theta(10000.0, 1.0, 64) == 10000.0


def test_yarn_interpolates_slow_pairs_and_sharpens_attention(tmp_path):
    """Pairs that turn 32 times and more inside the old length stay, those that turn once at most slow."""
    source = make_family_folder(tmp_path / "short", "qwen3")
    scale_folder(source, tmp_path / "long", 2048, "yarn")
    before, after = angles(source), angles(tmp_path / "long")
    turns = 512 * before / (2 * math.pi)
    for turn, ratio in zip(turns.tolist(), (before / after).tolist()):
        expected = 1 if turn >= 32 else 4 if turn <= 1 else None
        assert ratio == pytest.approx(expected, rel=1e-6) if expected else 1 < ratio < 4
    encoder = AutoModel.from_pretrained(tmp_path / "long")
    assert encoder.rotary_emb.attention_scaling == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("method", ["ntk", "yarn"])
def test_layers_with_windows_keep_their_angles(tmp_path, method):
    source = make_family_folder(tmp_path / "short", "modernbert")
    scale_folder(source, tmp_path / "long", 1024, method)
    assert torch.equal(angles(source, "sliding_attention"), angles(tmp_path / "long", "sliding_attention"))
    assert not torch.equal(angles(source, "full_attention"), angles(tmp_path / "long", "full_attention"))


@pytest.mark.parametrize("method", ["ntk", "yarn"])
@pytest.mark.parametrize("family", ["modernbert", "eurobert", "qwen3"])
def test_a_scaled_encoder_runs_packed_as_padded(tmp_path, family, method):
    source = make_family_folder(tmp_path / "short", family)
    scale_folder(source, tmp_path / "long", 1024, method)
    packed = norms_in_own_dtype(load_backbone(str(tmp_path / "long"), dtype=torch.float64).eval())
    padded = AutoModel.from_pretrained(
        tmp_path / "long", dtype=torch.float64, attn_implementation="sdpa"
    ).eval()
    compare(packed, norms_in_own_dtype(padded), (600, 20))


def test_limits_of_the_folder_follow_and_weights_stay(tmp_path):
    source = make_family_folder(tmp_path / "short", "eurobert")
    scale_folder(source, tmp_path / "long", 1024, "yarn")
    assert AutoConfig.from_pretrained(tmp_path / "long").max_position_embeddings == 1024
    assert AutoTokenizer.from_pretrained(tmp_path / "long").model_max_length == 1024
    weights = [(folder / "model.safetensors").read_bytes() for folder in (source, tmp_path / "long")]
    assert weights[0] == weights[1]


def test_old_names_of_fields_are_replaced(tmp_path):
    """A base beside rope_parameters would be read by transformers 4 and not by 5."""
    source = make_family_folder(tmp_path / "short", "modernbert")
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    (source / "config.json").write_text(json.dumps(config))
    scale_folder(source, tmp_path / "long", 1024, "ntk")
    assert "global_rope_theta" not in json.loads((tmp_path / "long" / "config.json").read_text())
    parameters = load_encoder_config(str(tmp_path / "long")).rope_parameters
    assert parameters["full_attention"]["rope_theta"] == pytest.approx(ntk_theta(160000.0, 2.0, 8))
    assert parameters["sliding_attention"]["rope_theta"] == 10000.0


def test_the_tool_names_the_method_for_the_kind_of_positions(tmp_path, capsys):
    rotary = make_family_folder(tmp_path / "rotary", "eurobert")
    table = make_tiny_model_folder(tmp_path / "table", max_tokens=64, heads=False)
    long = ["--max-tokens", "1024"]
    assert report_user_errors(main, [str(rotary), str(tmp_path / "out"), *long]) == 2
    said = capsys.readouterr().err
    assert "is a eurobert model, whose positions are rotary: it has no rows to add" in said
    assert "scale its angles with --method ntk or yarn" in said
    assert report_user_errors(main, [str(table), str(tmp_path / "out"), *long, "--method", "yarn"]) == 2
    assert (
        "positions are a table: there is no angle to scale; use tile, interpolate" in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()
    assert report_user_errors(main, [str(rotary), str(tmp_path / "out"), *long, "--method", "ntk"]) == 0
    assert "texts of up to 512 tokens → 1024; the rotary base is raised" in capsys.readouterr().out


def test_what_cannot_be_scaled_is_refused(tmp_path):
    source = make_family_folder(tmp_path / "short", "eurobert")
    with pytest.raises(ConfigError, match="must exceed the 512 tokens"):
        scale_folder(source, tmp_path / "none", 512, "ntk")
    with pytest.raises(ConfigError, match="use ntk or yarn, which scale its angles"):
        scale_folder(source, tmp_path / "none", 1024, "tile")
    scale_folder(source, tmp_path / "long", 1024, "yarn")
    with pytest.raises(ConfigError, match=r"has scaled rotary positions already \(yarn\)"):
        scale_folder(tmp_path / "long", tmp_path / "none", 4096, "ntk")
    with pytest.raises(CheckpointError, match="exists already"):
        scale_folder(source, tmp_path / "long", 1024, "ntk")
