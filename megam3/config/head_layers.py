"""Which layers the multi-vector head has: those of the folder, or the block that the recipe asks for. Free of
torch.

    the folder holds       the recipe asks for             the multi-vector head
    colbert_linear.pt      nothing                         one matrix
    1_Dense 2_Dense …      nothing                         those layers
    colbert_linear.pt      model.multi_vector_hidden       a block that adds nothing yet, then the matrix
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from megam3.config.schema import ModelConfig
from megam3.errors import CheckpointError
from megam3.token_layers import TokenLayer, read_token_layers, residual_layers


def find_layers(
    folder: Path, config: ModelConfig, hidden_size: int, width: int | None = None
) -> tuple[TokenLayer, ...]:
    """Layers of the multi-vector head; empty: one matrix.

    Args:
        width: C of the weights, where neither the recipe nor layers of the folder say it; None: the encoder's
            width.

    Raises:
        CheckpointError: layers that megam3 cannot compute, do not fit, or are not what the recipe asks for.
    """
    own = tuple(read_token_layers(folder).values())
    widths = [hidden_size, *(layer.out_features for layer in own)]
    if own and (
        own[0].in_features != hidden_size or any(a.out_features != b.in_features for a, b in pairwise(own))
    ):
        rule = f"its multi-vector layers {_shown(own)} do not follow an encoder of width {hidden_size}"
        raise CheckpointError("model.path", str(folder), rule, "use the layers that belong to this encoder")
    chain = own if len(own) > 1 or any(not layer.is_plain for layer in own) else ()
    if chain and config.multi_vector_dim not in (None, widths[-1]):
        rule = f"{folder} has the layers {_shown(chain)}"
        raise CheckpointError("model.multi_vector_dim", config.multi_vector_dim, rule, "leave it out")
    if config.multi_vector_hidden is None:
        return chain
    width = config.multi_vector_dim or (widths[-1] if own else None) or width
    activation = config.multi_vector_activation or "gelu"
    wanted = residual_layers(hidden_size, config.multi_vector_hidden, width or hidden_size, activation)
    if chain and chain != wanted:
        rule = f"{folder} has the layers {_shown(chain)}, not {_shown(wanted)}"
        remedy = "leave it out, to go on with those of the folder"
        raise CheckpointError("model.multi_vector_hidden", config.multi_vector_hidden, rule, remedy)
    return wanted


def _shown(layers: Sequence[TokenLayer]) -> str:
    """32 → 64 gelu + skip → 32 + skip → 8."""
    parts = [
        f"{layer.out_features}{'' if layer.activation == 'identity' else ' ' + layer.activation}"
        f"{' + skip' if layer.has_skip else ''}"
        for layer in layers
    ]
    return " → ".join([str(layers[0].in_features), *parts])
