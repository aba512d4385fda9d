"""The multi-vector head of several layers: a residual block before the projection to C numbers a token.

    x [T, D] → activation(W1·x + b1) + R1·x [T, H] → W2·h + b2 + R2·h [T, D] → W3·y + b3 [T, C]

As the head of mLateOn (arXiv 2607.27178), in the layers that PyLate has (`pylate.models.Dense`): each keeps
its own skip, which is a matrix where its input and output differ in width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megam3.token_layers import Activation, TokenLayer

_FUNCTIONS: dict[Activation, type[nn.Module]] = {
    "identity": nn.Identity,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


class ResidualLayer(nn.Module):
    """activation(W·x + b), plus x or R·x where the layer has a skip."""

    def __init__(self, layer: TokenLayer):
        super().__init__()
        self.layer = layer
        self.linear = nn.Linear(layer.in_features, layer.out_features)
        self.activation = _FUNCTIONS[layer.activation]()
        sizes = layer.in_features, layer.out_features
        self.residual = nn.Linear(*sizes, bias=False) if layer.has_matrix else None

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, in] → [T, out]."""
        out_TD = self.activation(self.linear(x_TD))
        if self.residual is not None:
            return out_TD + self.residual(x_TD)
        return out_TD + x_TD if self.layer.has_skip else out_TD


class Projection(nn.Sequential):
    """Layers one after another; `in_features` and `out_features` as of a Linear."""

    def __init__(self, layers: Sequence[TokenLayer]):
        super().__init__(*(ResidualLayer(layer) for layer in layers))
        self.layers = tuple(layers)
        self.in_features, self.out_features = layers[0].in_features, layers[-1].out_features

    @property
    def num_weights(self) -> int:
        """Entries of all matrices."""
        return sum(layer.in_features * layer.out_features * (1 + layer.has_matrix) for layer in self.layers)


@torch.no_grad()
def init_projection(projection: Projection) -> None:
    """Start where a single matrix would: layers with a skip add nothing yet and their skips keep angles (an
    orthonormal matrix, and its transpose on the way back), the others are as `init_linear`.

    The zeros learn: their gradient is a product of the skips, which are not zero, and of the activation's
    slope at 0, which is not zero for any of them.
    """
    last_skip_OI: Tensor | None = None
    for part in projection:
        assert isinstance(part, ResidualLayer)
        if not part.layer.has_skip:
            init_linear(part.linear)
            continue
        part.linear.weight.zero_()
        part.linear.bias.zero_()
        if part.residual is None:
            continue
        weight_OI = part.residual.weight
        if last_skip_OI is not None and last_skip_OI.T.shape == weight_OI.shape:
            weight_OI.copy_(last_skip_OI.T)
            last_skip_OI = None
        else:
            _orthonormal(weight_OI)
            last_skip_OI = weight_OI


@torch.no_grad()
def init_linear(linear: nn.Linear) -> None:
    """The identity, or rows (columns) orthonormal from a fixed seed, which keeps angles as well as so many
    dimensions can; no bias."""
    if linear.in_features == linear.out_features:
        nn.init.eye_(linear.weight)
    else:
        _orthonormal(linear.weight)
    linear.bias.zero_()


def _orthonormal(weight_OI: Tensor) -> None:
    nn.init.orthogonal_(weight_OI, generator=torch.Generator(weight_OI.device).manual_seed(0))
