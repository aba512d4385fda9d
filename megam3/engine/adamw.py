"""Which AdamW moves the weights: torch's, or DeepSpeed's for optimizer states in host memory.

    engine.adamw      optimizer states    runs
    auto, fused       anywhere            torch's, one fused kernel a step (CUDA, and vectorised on CPUs)
    plain             anywhere            torch's, an operator at a time
    deepspeed_cpu     in host memory      DeepSpeedCPUAdam, compiled by g++ at the first start of a machine

All compute AdamW (arXiv 1711.05101) in fp32 and differ by rounding. They keep their step count as different
types: `settle_steps` makes a checkpoint of one continue under another.
"""

import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.ops.op_builder import CPUAdamBuilder

from megam3.config.schema import OptimConfig
from megam3.engine.compiled_operators import load_operator

logger = logging.getLogger(__name__)

Wish = Literal["auto", "fused", "plain", "deepspeed_cpu"]
Kind = Literal["fused", "plain", "deepspeed_cpu"]

_WORDS = {
    "fused": "AdamW: torch's, fused",
    "plain": "AdamW: torch's, an operator at a time",
    "deepspeed_cpu": "AdamW: DeepSpeed's, on the host's vector units",
}


def choose_adamw(wish: Wish, load: Callable[[], Any] | None = None) -> Kind:
    """The implementation for this run, logged; DeepSpeed's is built here, before any weight is read.

    Args:
        load: builds and loads DeepSpeed's operator; None: its own builder.

    Raises:
        ConfigError: the operator cannot be built here.
    """
    kind: Kind = "fused" if wish == "auto" else wish
    if kind == "deepspeed_cpu":
        load_operator(
            "cpu_adam",
            load or CPUAdamBuilder().load,
            what="DeepSpeed's AdamW for host memory",
            field="engine.adamw",
            value=wish,
            remedy="install g++ and ninja, or set engine.adamw=auto",
        )
    logger.info(_WORDS[kind])
    return kind


def build_adamw(groups: list[dict], config: OptimConfig, kind: Kind = "fused") -> torch.optim.Optimizer:
    """AdamW over `groups`."""
    betas = (config.betas[0], config.betas[1])
    if kind == "deepspeed_cpu":
        return DeepSpeedCPUAdam(groups, betas=betas, eps=config.eps, adamw_mode=True)
    is_fused = kind == "fused"
    return torch.optim.AdamW(
        groups, betas=betas, eps=config.eps, fused=is_fused, foreach=None if is_fused else False
    )


def settle_steps(adamw: torch.optim.Optimizer) -> None:
    """Turn each parameter's count of steps into what `adamw` reads: a number for DeepSpeed's; for torch's a
    tensor, on the device for a fused kernel, else on the CPU."""
    for master, state in adamw.state.items():
        if "step" in state:
            state["step"] = step_count(float(state["step"]), master, adamw)


def step_count(steps: float, master: torch.Tensor, adamw: torch.optim.Optimizer) -> Any:
    """`steps` as `adamw` keeps it beside the moments of `master`."""
    if isinstance(adamw, DeepSpeedCPUAdam):
        return int(steps)
    device = master.device if adamw.param_groups[0].get("fused") else torch.device("cpu")
    return torch.tensor(steps, dtype=torch.float32, device=device)
