"""Extended positions: old rows bit for bit, new rows a cycle of them, the folder usable at once."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from megam3.cli import report_user_errors
from megam3.config.schema import ModelConfig
from megam3.errors import CheckpointError, ConfigError
from megam3.model.m3 import represent
from megam3.model.positions import extend_folder, extend_position_rows
from megam3.model.pretrained import load_m3
from megam3.packed_texts import pack_texts
from tests.factory import make_tiny_model_folder, random_token_ids
from tools.extend_positions import main


def load(folder):
    return load_m3(str(folder), ModelConfig(path=str(folder))).eval()


def test_rows_are_kept_and_repeated():
    rows = torch.randn(514, 3)
    extended = extend_position_rows(rows, 8192, 2)
    assert extended.shape == (8194, 3)
    assert torch.equal(extended[:514], rows)
    for position in (512, 513, 1023, 1024, 8191):
        assert torch.equal(extended[2 + position], rows[2 + position % 512])


def test_interpolated_rows_lie_on_the_lines_between_the_old_ones():
    rows = torch.cat([torch.full((2, 1), 9.0), torch.tensor([[0.0], [4.0], [2.0]])])
    extended = extend_position_rows(rows, 5, 2, "interpolate")
    torch.testing.assert_close(extended[:, 0], torch.tensor([9.0, 9, 0, 2, 4, 3, 2]))


def test_random_rows_have_the_old_ones_mean_and_deviation():
    rows = 3 + 2 * torch.randn(514, 4, generator=torch.Generator().manual_seed(1))
    extended = extend_position_rows(rows, 8192, 2, "random")
    assert torch.equal(extended[:514], rows)
    assert torch.equal(extended, extend_position_rows(rows, 8192, 2, "random"))
    # a standard error of the mean of 7680 draws is 0.023
    torch.testing.assert_close(extended[514:].mean(0), rows[2:].mean(0), rtol=0, atol=0.15)
    torch.testing.assert_close(extended[514:].std(0), rows[2:].std(0), rtol=0.1, atol=0)


def test_rows_are_never_removed():
    with pytest.raises(ValueError, match="10 positions are fewer than the 20 there are"):
        extend_position_rows(torch.zeros(22, 3), 10, 2)


def test_a_folder_reads_short_texts_as_before_and_long_ones_too(tmp_path):
    source = make_tiny_model_folder(tmp_path / "short", max_tokens=64)
    assert extend_folder(source, tmp_path / "long", 256) == (64, 256)
    short, long = load(source), load(tmp_path / "long")
    texts = pack_texts(random_token_ids([64, 5]))
    for a, b in zip(represent(short, texts).floats(), represent(long, texts).floats()):
        assert torch.equal(a, b)
    assert represent(long, pack_texts(random_token_ids([256]))).dense_ND.isfinite().all()
    assert AutoConfig.from_pretrained(tmp_path / "long").max_position_embeddings == 258
    assert AutoTokenizer.from_pretrained(tmp_path / "long").model_max_length == 256


def test_a_bin_file_is_read_too(tmp_path):
    source = make_tiny_model_folder(tmp_path / "short", max_tokens=64)
    model = load(source)
    state = {f"roberta.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    state["roberta.embeddings.position_ids"] = torch.arange(66)[None]
    (source / "model.safetensors").unlink()
    torch.save(state, source / "pytorch_model.bin")
    extend_folder(source, tmp_path / "long", 128)
    texts = pack_texts(random_token_ids([64, 5]))
    for a, b in zip(represent(model, texts).floats(), represent(load(tmp_path / "long"), texts).floats()):
        assert torch.equal(a, b)


def test_the_tool_says_what_it_did_and_refuses_shrinking(tmp_path, capsys):
    source = make_tiny_model_folder(tmp_path / "short", max_tokens=64)
    assert report_user_errors(main, [str(source), str(tmp_path / "long"), "--max-tokens", "128"]) == 0
    assert "texts of up to 64 tokens → 128" in capsys.readouterr().out
    assert report_user_errors(main, [str(source), str(tmp_path / "none"), "--max-tokens", "64"]) == 2
    assert "--max-tokens = 64: must exceed the 64 tokens" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_existing_folders_are_not_overwritten(tmp_path):
    source = make_tiny_model_folder(tmp_path / "short", max_tokens=64)
    with pytest.raises(CheckpointError, match="exists already; remove it or choose another name"):
        extend_folder(source, source, 128)


def test_rotary_positions_have_no_rows(tmp_path):
    AutoConfig.for_model("modernbert").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="positions are rotary: it has no rows to add"):
        extend_folder(tmp_path, tmp_path / "long", 16384)


def test_a_folder_without_position_rows_is_named(tmp_path):
    source = make_tiny_model_folder(tmp_path / "short", max_tokens=64)
    (source / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="its weight files hold 0 tensors named"):
        extend_folder(source, tmp_path / "long", 128)
    assert not (tmp_path / "long").exists()


def test_sentence_transformers_limit_follows(tmp_path):
    source = make_tiny_model_folder(tmp_path / "short", max_tokens=64)
    (source / "sentence_bert_config.json").write_text('{"max_seq_length": 64, "do_lower_case": false}')
    extend_folder(source, tmp_path / "long", 128)
    assert json.loads((tmp_path / "long" / "sentence_bert_config.json").read_text()) == {
        "max_seq_length": 128,
        "do_lower_case": False,
    }
    shutil.rmtree(tmp_path / "long")
