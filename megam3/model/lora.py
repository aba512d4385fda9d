"""Low-rank adapters in the encoder (LoRA, arXiv 2106.09685), through peft, and what they add merged back.

    y = W x + b  becomes  W x + b + (alpha / rank) · B A x,    A [rank, in], B [out, rank], W and b kept

Only A and B of the encoder are trained, beside the heads, which stay whole; B starts at 0, so training starts
at the model itself. peft names what it wraps:

    …query.weight  →  …query.base_layer.weight, …query.lora_A.default.weight, …query.lora_B.default.weight

The adapters are whole while the encoder may be partitioned already (ZeRO-3); `deepspeed.initialize`
partitions them with the heads.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megam3.config.schema import LoraConfig
from megam3.errors import ConfigError

ADAPTER = "default"
"""peft's name for the one set of adapters there is."""
_BASE, _DOWN, _UP = ".base_layer.weight", f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight"


def add_lora(encoder: PreTrainedModel, config: LoraConfig) -> None:
    """Put adapters into the encoder's linear layers and freeze all else of it.

    Raises:
        ConfigError: peft is not installed, or the encoder has no layers of these names.
    """
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            "model.lora", config.rank, f"needs the package peft ({error})", "pip install 'megam3[lora]'"
        ) from error
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.scaled_alpha,  # type: ignore[arg-type]  # a number like any other to peft
        lora_dropout=config.dropout,
        target_modules=config.target_modules or "all-linear",
        bias="none",
    )
    try:
        peft.inject_adapter_in_model(settings, encoder, ADAPTER)
    except ValueError as error:
        # peft says so of names that match nothing, and of layers that are not linear
        names = sorted({n.rpartition(".")[2] for n, m in encoder.named_modules() if _is_linear(m)})
        raise ConfigError(
            "model.lora.target_modules",
            config.target_modules,
            f"cannot be adapted ({str(error).splitlines()[0][:200]})",
            f"name linear layers of the encoder: {', '.join(names)}",
        ) from error


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def has_lora(state: Mapping[str, Tensor]) -> bool:
    """Whether these weights hold adapters."""
    return any(name.endswith(_DOWN) for name in state)


def merge_lora(state: Mapping[str, Tensor], config: LoraConfig) -> dict[str, Tensor]:
    """The same weights without adapters: W + (alpha / rank) · B A, formed in fp64, named as before
    `add_lora`.

    Args:
        state: weights by name, those of adapted layers under peft's names.
        config: of the run that trained them; the weights do not know alpha.
    """
    merged: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith((_DOWN, _UP)):
            continue
        if name.endswith(_BASE):
            stem = name.removesuffix(_BASE)
            down_RI, up_OR = state[stem + _DOWN].double(), state[stem + _UP].double()
            scale = config.scaled_alpha / down_RI.shape[0]
            merged[stem + ".weight"] = (tensor.double() + scale * (up_OR @ down_RI)).float()
        else:
            merged[name.replace(".base_layer.", ".")] = tensor
    return merged
