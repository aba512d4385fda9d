"""On which device a model computes for inference, and in which precision, by the names that people write."""

from typing import Literal, cast

import torch

from megam3.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
PrecisionWish = Literal["auto", Precision]
"""auto: bf16 on CUDA, fp16 on a card that only emulates bf16 (before Ampere), fp32 elsewhere."""
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of this name; None: CUDA when there is one.

    Raises:
        ConfigError: no such device in this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError("device", str(name), "is no device that torch knows", "use cpu or cuda") from error
    remedy = "use cpu, or leave it out"
    if device.type != "cuda":
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            rule = f"cannot be used ({str(error).splitlines()[0]})"
            raise ConfigError("device", str(name), rule, remedy) from error
    # counted and not tried: the process that hands work to others shall hold no memory of their devices
    elif (device.index or 0) >= torch.cuda.device_count():
        rule = f"this machine has {torch.cuda.device_count()} CUDA devices that torch can use"
        raise ConfigError("device", str(name), rule, remedy)
    return device


def pick_precision(wish: str, device: torch.device) -> Precision:
    """`wish`, or what `auto` is on this device.

    Raises:
        ConfigError: an unknown name.
    """
    if wish == "auto":
        if device.type != "cuda":
            return "fp32"
        return "fp16" if emulates_bf16(device) else "bf16"
    if wish not in DTYPES:
        rule = f"must be auto or one of {', '.join(DTYPES)}"
        raise ConfigError("precision", wish, rule, "leave it at auto")
    return cast(Precision, wish)


def emulates_bf16(device: torch.device) -> bool:
    """Whether bf16 on this GPU is done in fp32 by software: right, and slower than fp32."""
    return device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False)


def emulation_warning(dtype: torch.dtype, device: torch.device) -> str | None:
    """What to say before training in a precision that this GPU has no instructions for."""
    if dtype != torch.bfloat16 or not emulates_bf16(device):
        return None
    return (
        f"this GPU ({torch.cuda.get_device_name(device)}) only emulates bf16, which is slower than fp32: "
        "set engine.precision=fp16, which scales the loss, or fp32"
    )
