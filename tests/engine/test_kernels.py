"""The choice of a flash-attention release: what is activated, what is said when it cannot be."""

import logging

import pytest
import torch
from torch.nn import attention

from megam3.engine.kernels import activate_attention, check_kernels, wished_path
from megam3.errors import ConfigError
from megam3.model.attention import report_attention, wish_attention
from megam3.model.backbone import build_backbone
from tests.factory import make_tiny_model_folder, random_token_ids
from tests.gpu.varlen_stand_in import install
from tests.model.test_attention import packed_hidden, tiny
from tests.recipes import make_config

CUDA = torch.device("cuda", 0)


@pytest.fixture
def activated(monkeypatch) -> list[str]:
    """Stands in for installed packages: what was activated, in order."""
    names: list[str] = []
    monkeypatch.setattr(attention, "activate_flash_attention_impl", names.append)
    return names


def _capability(monkeypatch, major: int) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))


@pytest.mark.parametrize(
    ("wish", "major", "runs"),
    [
        ("auto", 9, "FA3"),
        ("auto", 10, "FA4"),
        ("auto", 8, "FA2"),
        ("fa2", 9, "FA2"),
        ("fa3", 9, "FA3"),
        ("fa4", 9, "FA4"),
        ("varlen", 9, "FA3"),
        ("sdpa", 9, "none"),
    ],
)
def test_the_release_that_runs(monkeypatch, activated, wish, major, runs):
    _capability(monkeypatch, major)
    assert activate_attention(wish, CUDA) == runs
    assert activated == ([] if runs in ("FA2", "none") else [runs])


@pytest.mark.parametrize(("wish", "level"), [("fa3", logging.WARNING), ("auto", logging.INFO)])
def test_a_release_that_is_not_installed_is_said_and_fa2_runs(monkeypatch, caplog, wish, level):
    """torch's own function: neither package is installed here."""
    _capability(monkeypatch, 9)
    with caplog.at_level(logging.INFO):
        assert activate_attention(wish, CUDA) == "FA2"
    (record,) = caplog.records
    assert record.levelno == level
    assert f"engine.attention = {wish}: FA3 cannot be used (" in record.getMessage()
    assert record.getMessage().endswith("FA2 runs instead")


def test_an_older_torch_has_nothing_to_exchange(monkeypatch, caplog):
    monkeypatch.delattr(attention, "activate_flash_attention_impl")
    assert activate_attention("fa4", CUDA) == "FA2"
    assert "this torch cannot exchange its kernel" in caplog.text


def test_on_a_cpu_a_wish_is_said_to_be_idle(caplog, activated):
    for wish in ("auto", "varlen", "sdpa"):
        assert activate_attention(wish, torch.device("cpu")) == "none"
    assert not caplog.records
    assert activate_attention("fa3", torch.device("cpu")) == "none"
    assert "engine.attention = fa3: only GPUs have it, this is a cpu device" in caplog.text
    assert activated == []


@pytest.fixture
def recipe(tmp_path):
    """A recipe of a tiny encoder whose own config has attention dropout, as published ones do."""
    folder = make_tiny_model_folder(tmp_path / "model", dropout=0.1)

    def make(**changes):
        return make_config(model__path=str(folder), **changes)

    return make


@pytest.mark.parametrize(
    ("field", "value", "device", "dtype", "message"),
    [
        (
            "attention",
            "varlen",
            "cpu",
            torch.float32,
            "engine.attention = 'varlen': torch's varlen kernel cannot run here, because of a cpu device"
            " without varlen kernel; use auto or sdpa",
        ),
        (
            "compile_layers",
            True,
            "cpu",
            torch.float32,
            "engine.compile_layers = True: layers are compiled once only with the varlen kernel, which cannot"
            " run here, because of a cpu device without varlen kernel; set engine.compile_layers=false",
        ),
        (
            "attention",
            "varlen",
            "cuda",
            torch.bfloat16,
            "engine.attention = 'varlen': torch's varlen kernel cannot run here, because of the encoder's"
            " attention dropout of 0.1, which the varlen kernel does not have; set model.attention_dropout="
            "0.0, or use auto or sdpa",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_way_out(
    recipe, monkeypatch, field, value, device, dtype, message
):
    if device == "cuda":
        install(monkeypatch)
    config = recipe(**{f"engine__{field}": value})
    with pytest.raises(ConfigError) as caught:
        check_kernels(config, torch.device(device), dtype)
    assert str(caught.value) == message
    check_kernels(recipe(), torch.device(device), dtype)


def test_the_way_out_is_one(recipe, monkeypatch):
    install(monkeypatch)
    for field, value in (("attention", "varlen"), ("compile_layers", True)):
        config = recipe(**{f"engine__{field}": value}, model__attention_dropout=0.0)
        check_kernels(config, CUDA, torch.bfloat16)


def test_sdpa_goes_by_runs_where_the_kernel_would_do(monkeypatch):
    stand_in = install(monkeypatch, any_dtype=True)
    encoder = build_backbone(tiny("xlm-roberta"))
    token_ids = random_token_ids([5, 9, 5])
    expected = packed_hidden(encoder, token_ids)
    assert stand_in.launches == 3
    wish_attention(torch.nn.Sequential(encoder), wished_path("sdpa"))
    torch.testing.assert_close(packed_hidden(encoder, token_ids), expected, rtol=1e-5, atol=1e-5)
    assert stand_in.launches == 3
    report = report_attention(encoder, CUDA)
    assert not report.is_slow, "it was asked for"
    assert "because of engine.attention = sdpa" in report.line
    wish_attention(encoder, wished_path("fa3"))
    packed_hidden(encoder, token_ids)
    assert stand_in.launches == 6
