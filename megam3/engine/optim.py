"""AdamW's parameter groups: weight decay off for biases and norms, learning rates by head and by
layer."""

import re
from collections.abc import Callable, Iterable

from torch import nn

from megam3.config.schema import OptimConfig

_LAYER = re.compile(r"^encoder\.(?:encoder\.)?layers?\.(\d+)\.")
"""Encoder layers: `encoder.encoder.layer.0.` in the BERT families, `encoder.layers.0.` in ModernBERT."""
_LOWEST = ("encoder.embeddings.", "encoder.embed_tokens.")
"""What lies below the lowest layer."""


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    is_head_parameter: Callable[[str], bool],
) -> list[dict]:
    """Split trainable parameters into groups of one learning rate and one weight decay, each in exactly one:
    (encoder | heads) × (decayed | not) where the recipe gives no rates by head or layer.

    Biases and norm parameters are one-dimensional; under ZeRO-3 every partitioned parameter is, so the full
    shape decides. Each group carries `peak_lr`, which the engine multiplies with the schedule's factor.
    """
    named = list(named_parameters)
    # frozen layers count too: freezing the lower half must not change the rates of the upper one
    num_layers = max((int(found[1]) + 1 for name, _ in named if (found := _LAYER.match(name))), default=0)
    groups: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            is_head = is_head_parameter(name)
            lr = head_lr(name, config) if is_head else encoder_lr(name, config, num_layers)
            groups.setdefault((is_head, lr, len(shape) > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "peak_lr": lr,
            "lr": lr,
        }
        for (_, lr, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def head_lr(name: str, config: OptimConfig) -> float:
    """Peak learning rate of a head's parameter: the head's own, else `head_lr`, else `lr`."""
    own = None
    if name.startswith(("lexical_head.", "expansion_head.")):
        own = config.lexical_lr
    elif name.startswith("multi_vector_head."):
        own = config.multi_vector_lr
    return own or config.head_lr or config.lr


def encoder_lr(name: str, config: OptimConfig, num_layers: int) -> float:
    """Peak learning rate of an encoder's parameter: lr · layer_decay ^ (layers above it).

    With 3 layers and 0.5: 1/8 for the embeddings, 1/4, 1/2 and 1 for the layers, 1 for a final norm.
    """
    if config.layer_decay is None:
        return config.lr
    layer = _LAYER.match(name)
    if layer is not None:
        return config.lr * config.layer_decay ** (num_layers - 1 - int(layer[1]))
    return config.lr * config.layer_decay**num_layers if name.startswith(_LOWEST) else config.lr


def group_layout(config: OptimConfig) -> list[float | None]:
    """What decides how parameters fall into groups, beyond head and decay; empty where nothing does.

    Optimizer states are cut by group: a checkpoint of another layout is joined by parameter name.
    """
    by_name = [config.lexical_lr, config.multi_vector_lr, config.layer_decay]
    return [config.lr, config.head_lr, *by_name] if any(x is not None for x in by_name) else []
