"""Names of devices and precisions, and what is said of those that are none."""

import pytest
import torch

from megam3.errors import ConfigError
from megam3.model.device import DTYPES, pick_device, pick_precision


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


def test_precisions():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert (pick_precision("auto", cpu), pick_precision("auto", cuda)) == ("fp32", "bf16")
    assert [pick_precision(name, cuda) for name in DTYPES] == list(DTYPES)
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == {"fp32": 4, "bf16": 2, "fp16": 2}
    with pytest.raises(
        ConfigError, match="precision = 'int8': must be auto or one of fp32, bf16, fp16; leave"
    ):
        pick_precision("int8", cpu)
