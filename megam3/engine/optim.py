"""AdamW and its parameter groups: weight decay off for biases and norms, an own learning rate for the
heads."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from megam3.config.schema import OptimConfig


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimConfig,
    is_head_parameter: Callable[[str], bool],
) -> list[dict]:
    """Split trainable parameters into up to four groups, (encoder | heads) × (decayed | not), each in exactly
    one.

    Biases and norm parameters are one-dimensional; under ZeRO-3 every partitioned parameter is, so the full
    shape decides. Each group carries `peak_lr`, which the engine multiplies with the schedule's factor.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            groups.setdefault((is_head_parameter(name), len(shape) > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decayed else 0.0,
            "peak_lr": (config.head_lr or config.lr) if is_head else config.lr,
            "lr": (config.head_lr or config.lr) if is_head else config.lr,
        }
        for (is_head, decayed), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def build_adamw(groups: list[dict], config: OptimConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW (arXiv 1711.05101) over `groups`; one fused kernel per step where the device has it."""
    beta1, beta2 = config.betas
    return torch.optim.AdamW(
        groups, betas=(beta1, beta2), eps=config.eps, fused=device.type in ("cuda", "cpu")
    )
