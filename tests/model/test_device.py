"""Names of devices and precisions, and what is said of those that are none."""

import re

import pytest
import torch

from megam3.errors import ConfigError
from megam3.model.device import DTYPES, emulates_bf16, emulation_warning, pick_device, pick_precision


def test_a_device_by_name_or_the_best_there_is(monkeypatch):
    assert pick_device("cpu") == pick_device(torch.device("cpu")) == torch.device("cpu")
    for is_there, expected in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_there=is_there: is_there)
        assert pick_device(None) == torch.device(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuda:2", "this machine has 2 CUDA devices that torch can use; use cpu, or leave it out"),
        ("mps", r"cannot be used \(.+\); use cpu, or leave it out"),
        ("gpu", "is no device that torch knows; use cpu or cuda"),
        (3.5, "is no device that torch knows; use cpu or cuda"),
    ],
)
def test_a_device_that_is_not_there(monkeypatch, name, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1").index == 1, "counted, not tried"
    with pytest.raises(ConfigError, match=f"device = '{name}': {message}"):
        pick_device(name)


@pytest.mark.parametrize(("computes_it", "expected"), [(True, "bf16"), (False, "fp16")])
def test_a_card_that_only_emulates_bf16_is_not_asked_for_it(monkeypatch, computes_it, expected):
    # an emulating card says yes unless asked not to count emulation
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or computes_it
    )
    assert pick_precision("auto", torch.device("cuda")) == expected
    assert pick_precision("bf16", torch.device("cuda")) == "bf16"
    assert emulates_bf16(torch.device("cuda")) is not computes_it
    assert not emulates_bf16(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    warning = emulation_warning(torch.bfloat16, torch.device("cuda"))
    expected = r"\(Tesla V100\) only emulates bf16.*engine.precision=fp16"
    assert (warning is None) if computes_it else re.search(expected, warning)
    assert emulation_warning(torch.float16, torch.device("cuda")) is None


def test_precisions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (pick_precision("auto", cpu), pick_precision("auto", cuda)) == ("fp32", "bf16")
    assert [pick_precision(name, cuda) for name in DTYPES] == list(DTYPES)
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == {"fp32": 4, "bf16": 2, "fp16": 2}
    with pytest.raises(
        ConfigError, match="precision = 'int8': must be auto or one of fp32, bf16, fp16; leave"
    ):
        pick_precision("int8", cpu)
