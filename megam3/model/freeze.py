"""Parts of an encoder that keep their weights, by the names of `model.freeze`.

    encoder        everything of the encoder
    embeddings     encoder.embeddings.*
    positions      encoder.embeddings.position_embeddings.*
    layers 0..5    encoder.encoder.layer.0.* … layer.5.*

A frozen parameter has no gradient, no moments and no fp32 master; what lies below the lowest trained one is
not even walked through in the backward pass.
"""

from collections.abc import Sequence

from torch import nn

from megam3.config.freezing import layer_range
from megam3.errors import ConfigError

_LAYER_LISTS = ("encoder.encoder.layer.", "encoder.layers.")
_PREFIXES = {
    "encoder": ("encoder.",),
    "embeddings": ("encoder.embeddings.", "encoder.embed_tokens."),
    "positions": ("encoder.embeddings.position_embeddings.",),
}


def freeze_parameters(module: nn.Module, parts: Sequence[str]) -> None:
    """Take the parameters of `parts` out of training; `parts` have been checked by their form.

    Raises:
        ConfigError: a part that this encoder does not have, or nothing is left to train.
    """
    parameters = dict(module.named_parameters())
    for part in parts:
        span = layer_range(part)
        numbers = () if span is None else range(span[0], span[1] + 1)
        prefixes = tuple(f"{lead}{n}." for lead in _LAYER_LISTS for n in numbers) or _PREFIXES[part]
        chosen = [name for name in parameters if name.startswith(prefixes)]
        last = () if span is None else tuple(f"{lead}{span[1]}." for lead in _LAYER_LISTS)
        if not chosen or (last and not any(name.startswith(last) for name in chosen)):
            raise ConfigError("model.freeze", part, "the encoder has no such part", "leave it out")
        for name in chosen:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        remedy = "freeze less, or add a head with weights to objective.heads"
        raise ConfigError("model.freeze", list(parts), "leaves nothing to train", remedy)
