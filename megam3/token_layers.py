"""The multi-vector head as a chain of layers, as PyLate and sentence-transformers keep it: what a folder
holds. Free of torch.

    FOLDER/  modules.json                                   names the layers in their order
             1_Dense/config.json  1_Dense/model.safetensors     linear.weight, linear.bias, residual.weight

A layer is activation(W·x + b), and where `use_residual` says so its input is added: as it is where the widths
agree, through `residual.weight` where they differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megam3.encoders import HEAD_FILES
from megam3.errors import CheckpointError
from megam3.files import read_json

Activation = Literal["identity", "gelu", "silu", "tanh"]
CLASS_PATHS: dict[str, str] = {
    "identity": "torch.nn.modules.linear.Identity",
    "gelu": "torch.nn.modules.activation.GELU",
    "silu": "torch.nn.modules.activation.SiLU",
    "tanh": "torch.nn.modules.activation.Tanh",
}
"""How config.json of a layer names an activation."""
WEIGHTS_FILE = "model.safetensors"
_NAMES = {path.rsplit(".", 1)[-1]: name for name, path in CLASS_PATHS.items()}
_TOKENS = "token_embeddings"


@dataclass(frozen=True, kw_only=True)
class TokenLayer:
    """One layer of the head."""

    in_features: int
    out_features: int
    activation: Activation = "identity"
    has_skip: bool = False
    """Its input is added to its output."""

    @property
    def has_matrix(self) -> bool:
        """The skip is a matrix, because input and output differ in width."""
        return self.has_skip and self.in_features != self.out_features

    @property
    def is_plain(self) -> bool:
        """One matrix and a bias, which `colbert_linear.pt` can hold."""
        return self.activation == "identity" and not self.has_skip


def residual_layers(
    hidden_size: int, inner_size: int, out_size: int, activation: Activation
) -> tuple[TokenLayer, ...]:
    """A residual block D → H → D, and the projection D → C."""
    return (
        TokenLayer(in_features=hidden_size, out_features=inner_size, activation=activation, has_skip=True),
        TokenLayer(in_features=inner_size, out_features=hidden_size, has_skip=True),
        TokenLayer(in_features=hidden_size, out_features=out_size),
    )


def read_token_layers(folder: Path) -> dict[str, TokenLayer]:
    """The layers that `modules.json` of a folder applies to tokens, in order, by the folder each lies in;
    empty: there are none, and `1_Dense` of a model with one vector a text is none.

    Raises:
        CheckpointError: a layer that megam3 cannot compute.
    """
    if not (folder / "modules.json").is_file():
        return {}
    try:
        dense = [(kind, place) for kind, place in _modules(folder) if _is_dense(kind)]
        configs = {place: (kind, read_json(folder / place / "config.json")) for kind, place in dense}
        return {
            place: _layer(config, folder / place / "config.json")
            for place, (kind, config) in configs.items()
            if kind.startswith("pylate.") or config.get("module_input_name") == _TOKENS
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        rule = f"names layers that cannot be read ({type(error).__name__}: {error})"
        raise CheckpointError("model", str(folder / "modules.json"), rule, "copy the folder again") from error


def find_vector_layers(folder: Path) -> list[str]:
    """Folders of the layers that a sentence-transformers model applies to its dense vector after pooling
    (EmbeddingGemma has two), which megam3 does not compute.

    Raises:
        CheckpointError: as `read_token_layers`.
    """
    of_tokens = read_token_layers(folder)
    if not (folder / "modules.json").is_file():
        return []
    dense = [place for kind, place in _modules(folder) if _is_dense(kind)]
    return [place for place in dense if place not in of_tokens]


def _modules(folder: Path) -> list[tuple[str, str]]:
    """(class, folder) of each module."""
    return [(str(module["type"]), str(module["path"])) for module in read_json(folder / "modules.json")]


def _is_dense(kind: str) -> bool:
    return kind.rsplit(".", 1)[-1] == "Dense"


def _layer(config: Mapping[str, Any], file: Path) -> TokenLayer:
    name = str(config.get("activation_function") or "Identity")
    activation = _NAMES.get(name.rsplit(".", 1)[-1])
    if activation is None:
        rule = f"has the activation {name}, which megam3 does not compute in a multi-vector head"
        raise CheckpointError("model.path", str(file), rule, f"use one of {', '.join(_NAMES)}")
    return TokenLayer(
        in_features=int(config["in_features"]),
        out_features=int(config["out_features"]),
        activation=activation,  # type: ignore[arg-type]
        has_skip=bool(config.get("use_residual")),
    )


def layer_config(layer: TokenLayer) -> dict[str, object]:
    """config.json of a layer."""
    return {
        "in_features": layer.in_features,
        "out_features": layer.out_features,
        "bias": True,
        "activation_function": CLASS_PATHS[layer.activation],
        "use_residual": layer.has_skip,
    }


def has_head(folder: Path, head: str) -> bool:
    """Whether a folder holds weights of `head` (lexical or multi_vector): a published file, or layers."""
    if (folder / HEAD_FILES[head]).is_file():
        return True
    return head == "multi_vector" and bool(read_token_layers(folder))
