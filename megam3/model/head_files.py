"""Weights of the heads beside an encoder: `sparse_linear.pt`, `colbert_linear.pt`, or a chain of layers for
the multi-vector head (`megam3/token_layers.py`; `megam3/config/head_layers.py` says which).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from megam3.encoders import HEAD_FILES
from megam3.errors import CheckpointError
from megam3.model.projection import Projection, ResidualLayer
from megam3.token_layers import WEIGHTS_FILE, TokenLayer, read_token_layers

HeadState = dict[str, Tensor]


def width_of_file(folder: Path) -> int | None:
    """C of a published `colbert_linear.pt`; None: there is none.

    Raises:
        CheckpointError: as `read_head_file`.
    """
    file = folder / HEAD_FILES["multi_vector"]
    return read_head_file(file)["weight"].shape[0] if file.is_file() else None


def read_heads(
    folder: Path, names: Sequence[str], missing: str
) -> dict[str, HeadState | list[HeadState] | None]:
    """Weights of heads by name; None where the folder has none and `missing` is `init`; a list where the
    multi-vector head is a chain of layers.

    Raises:
        CheckpointError: unreadable weights, or missing ones under `missing: error`.
    """
    found: dict[str, HeadState | list[HeadState] | None] = {}
    for name in names:
        file = folder / HEAD_FILES[name]
        layers = read_token_layers(folder) if name == "multi_vector" and not file.is_file() else {}
        if layers:
            states = [_read_layer(folder / place, layer) for place, layer in layers.items()]
            is_plain = len(states) == 1 and next(iter(layers.values())).is_plain
            found[name] = _as_matrix(states[0]) if is_plain else states
        elif file.is_file():
            found[name] = read_head_file(file)
        elif missing == "error":
            rule = "head weights are missing"
            remedy = "set model.missing_heads: init to start this head from scratch"
            raise CheckpointError("model.path", str(file), rule, remedy)
        else:
            found[name] = None
    return found


def read_head_file(file: Path) -> HeadState:
    """{"weight", "bias"} of a published head file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        head = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different class for each way in which a file can be damaged
        remedy = "write it with torch.save({'weight': …, 'bias': …})"
        raise CheckpointError("model.path", str(file), f"cannot be read ({error})", remedy) from error
    if not isinstance(head, dict) or set(head) != {"weight", "bias"}:
        found = sorted(head) if isinstance(head, dict) else type(head).__name__
        rule = f"must hold exactly weight and bias, not {found}"
        raise CheckpointError("model.path", str(file), rule, "export the head again")
    return head


def _read_layer(folder: Path, layer: TokenLayer) -> HeadState:
    """Weights of one layer, fp32, under the names of a ResidualLayer; a bias that is not there is 0."""
    file = folder / WEIGHTS_FILE
    try:
        state = (
            load_file(file)
            if file.is_file()
            else torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
        )
        state = {name: tensor.float() for name, tensor in state.items()}
    except Exception as error:  # safetensors and torch raise a class for each way of damage
        rule = f"cannot be read ({str(error).splitlines()[0][:200]})"
        raise CheckpointError("model.path", str(file), rule, "copy the folder again") from error
    sizes = layer.out_features, layer.in_features
    state.setdefault("linear.bias", torch.zeros(layer.out_features))
    wanted = {"linear.weight": sizes, "linear.bias": sizes[:1]}
    if layer.has_matrix:
        wanted["residual.weight"] = sizes
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != wanted:
        rule = f"holds {shapes}, its config.json says {wanted}"
        raise CheckpointError("model.path", str(file), rule, "export the head again")
    return state


def _as_matrix(state: HeadState) -> HeadState:
    return {"weight": state["linear.weight"], "bias": state["linear.bias"]}


@torch.no_grad()
def fill_head(head: nn.Linear | Projection, found: HeadState | list[HeadState] | None, file: Path) -> None:
    """Put weights that `read_heads` found into a head; None leaves it as it starts.

    Raises:
        CheckpointError: other shapes.
    """
    if found is None:
        return
    if isinstance(found, list):
        assert isinstance(head, Projection), "a folder with layers gives a head with layers"
        for part, state in zip(head, found, strict=True):
            part.load_state_dict(state)
        return
    if isinstance(head, Projection):
        last = head[-1]
        assert isinstance(last, ResidualLayer)
        head = last.linear
    _fill_linear(head, found, file)


def _fill_linear(linear: nn.Linear, found: Mapping[str, Tensor], file: Path) -> None:
    for name, parameter in (("weight", linear.weight), ("bias", linear.bias)):
        if found[name].shape != parameter.shape:
            raise CheckpointError(
                "model.path",
                str(file),
                f"{name} has shape {tuple(found[name].shape)}, the model needs {tuple(parameter.shape)}",
                "use the heads that belong to this encoder, or set model.multi_vector_dim to their width",
            )
        parameter.copy_(found[name])
