"""Nothing of another origin is unpickled: tensors alone come out of a model folder or a checkpoint."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megam3.config.schema import ModelConfig
from megam3.errors import UserError
from megam3.export.imported import import_model
from megam3.export.merge import merge_folders
from megam3.model.pretrained import load_m3
from tests.factory import make_tiny_model_folder

ROOT = Path(__file__).resolve().parents[2]
BETWEEN_OWN_PROCESSES = {"megam3/data/process.py"}
"""Both ends of its pipes are this program."""


class Evil:
    """What runs when it is unpickled."""

    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self._mark,)


CALLS: dict[str, Callable[[Path, Path], object]] = {
    "training": lambda model, out: load_m3(str(model), ModelConfig(path=str(model))),
    "import": lambda model, out: import_model(str(model), out, new_heads=True),
    "merge": lambda model, out: merge_folders([str(model), str(model)], out, None, "average"),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("file", ["sparse_linear.pt", "pytorch_model.bin"])
def test_a_pickle_in_a_model_folder_does_not_run(tmp_path: Path, call: str, file: str) -> None:
    model, mark = tmp_path / "model", tmp_path / "it ran"
    make_tiny_model_folder(model)
    if file == "pytorch_model.bin":
        (model / "model.safetensors").unlink()
    torch.save({"weight": Evil(mark)}, model / file)
    with pytest.raises(UserError):
        CALLS[call](model, tmp_path / "out")
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


def test_every_load_asks_for_tensors_alone() -> None:
    """A new call without the word is found here."""
    without = []
    for path in (ROOT / "megam3").rglob("*.py"):
        name, text = str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")
        for call in re.finditer(r"torch\.load\([^\n]*", text):
            if "weights_only=True" not in call.group():
                without.append(f"{name}: {call.group()}")
        if re.search(r"\bpickle\.loads?\(|allow_pickle=True|yaml\.load\(", text):
            without.append(name)
    assert set(without) == BETWEEN_OWN_PROCESSES
