"""The multi-vector head of several layers: its parameters, what its layers keep for the backward pass, and
what that pass adds. Pure arithmetic.

A layer in → out keeps, in entries a token, what is not kept elsewhere already (the last hidden states, and
the rows before their normalisation):

    out     its output, which the next layer reads; the last layer's are the rows
    out     gelu, silu: the product before the activation
    out     tanh: what it gives, where the layer has a skip; without one that is the layer's output

so a block D → H → D before the rows keeps D + 2·H, and D + H where its activation is the identity. Its
backward pass adds most where the second layer gives the first one's gradients: two of H, of product and skip.
"""

from megam3.planning.shapes import ModelShape
from megam3.token_layers import TokenLayer


def multi_vector_parameters(model: ModelShape) -> int:
    """Matrices (skips have some too) and biases of the head; of one matrix where it has no layers."""
    if not model.multi_vector_layers:
        return model.row_width * (model.hidden_size + 1)
    return sum(
        layer.in_features * layer.out_features * (1 + layer.has_matrix) + layer.out_features
        for layer in model.multi_vector_layers
    )


def kept_entries(model: ModelShape) -> int:
    """Entries a token between the last hidden states and the rows; 0 for a single matrix."""
    layers = model.multi_vector_layers
    return sum(layer.out_features for layer in layers[:-1]) + sum(map(_kept_inside, layers))


def backward_entries(model: ModelShape, num_tokens: int) -> int:
    """Entries for `num_tokens` that the backward pass through the layers adds at its worst moment to what the
    forward pass kept: gradients of a layer's output, around its activation, of its input, and of one weight;
    what later layers kept is gone. 0 for a single matrix.
    """
    worst = gone = 0
    for layer in reversed(model.multi_vector_layers):
        around_activation = layer.out_features * (layer.activation != "identity")
        added = layer.out_features + around_activation + layer.in_features * (1 + layer.has_skip)
        if layer is not model.multi_vector_layers[-1]:
            gone += layer.out_features
        worst = max(worst, num_tokens * (added - gone) + layer.in_features * layer.out_features)
        gone += _kept_inside(layer)
    return worst


def _kept_inside(layer: TokenLayer) -> int:
    """Entries a token that the activation keeps beside the layer's output."""
    is_kept = layer.activation in ("gelu", "silu") or (layer.activation == "tanh" and layer.has_skip)
    return layer.out_features * is_kept
