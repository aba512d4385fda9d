"""Which flash-attention release torch's varlen kernel runs: FlashAttention 2, which is part of torch, or 3 or
4 where their packages are installed (`torch.nn.attention.activate_flash_attention_impl`).

    engine.attention   compute capability   installed              runs
    auto               9.0 (H100)           flash_attn_interface   FA3
    auto               10.0 (B200)          flash_attn.cute        FA4
    auto               any other, or neither package               FA2
    fa3, fa4           any                  not installed          FA2, with a warning that says so
    varlen             as auto
    sdpa               none of them: scaled_dot_product_attention

Whether an encoder's attention can use the varlen kernel at all, `megam3/model/attention.py` decides; here a
recipe that asks for it in vain is refused.
"""

import logging
from typing import Literal

import torch
from torch.nn import attention

from megam3.config.schema import RunConfig
from megam3.errors import ConfigError
from megam3.model.attention import AttentionWish, choose_attention
from megam3.model.backbone import load_encoder_config, override_dropout

logger = logging.getLogger(__name__)

BEST_BY_CAPABILITY = {9: "FA3", 10: "FA4"}
"""The release written for a generation of GPUs, by the major part of its compute capability."""

Wish = Literal["auto", "varlen", "sdpa", "fa2", "fa3", "fa4"]


def wished_path(wish: Wish) -> AttentionWish:
    """What a wish says to the encoder: releases of the kernel are chosen for the whole process, see below."""
    return wish if wish in ("varlen", "sdpa") else "auto"


def check_kernels(config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse what the recipe asks of attention and this device, precision or encoder cannot do; from
    config.json alone, before any text is tokenised and any weight is read.

    Args:
        dtype: the weights'.

    Raises:
        ConfigError: engine.attention or engine.compile_layers.
    """
    engine = config.engine
    if engine.attention != "varlen" and not engine.compile_layers:
        return
    encoder = load_encoder_config(config.model.path, config.model.attention)
    override_dropout(encoder, config.model.hidden_dropout, config.model.attention_dropout)
    choice = choose_attention(encoder, device, dtype, True, wished_path(engine.attention))
    if choice.kernel == "varlen":
        return
    helps = f"{choice.remedy}, or " if choice.remedy else ""
    if engine.attention == "varlen":
        rule = f"torch's varlen kernel cannot run here, because of {choice.obstacle}"
        raise ConfigError("engine.attention", "varlen", rule, f"{helps}use auto or sdpa")
    rule = (
        "layers are compiled once only with the varlen kernel, which cannot run here, because of"
        f" {choice.obstacle}"
    )
    raise ConfigError("engine.compile_layers", True, rule, f"{helps}set engine.compile_layers=false")


def activate_attention(wish: Wish, device: torch.device) -> str:
    """Make torch's varlen kernel run the wished release, for the whole process; returns which one it is.

    A release that cannot be had is a line in the log: training goes on with FA2, which computes the same to
    rounding and is slower.
    """
    if wish == "sdpa":
        return "none"
    if device.type != "cuda":
        if wish not in ("auto", "varlen"):
            logger.warning("engine.attention = %s: only GPUs have it, this is a %s device", wish, device.type)
        return "none"
    wanted = wish.upper()
    if wish in ("auto", "varlen"):
        major, _ = torch.cuda.get_device_capability(device)
        wanted = BEST_BY_CAPABILITY.get(major, "FA2")
    if wanted == "FA2":
        return "FA2"
    obstacle = _activate(wanted)
    if obstacle is None:
        logger.info("attention: the varlen kernel is %s", wanted)
        return wanted
    level = logging.INFO if wish in ("auto", "varlen") else logging.WARNING
    logger.log(
        level, "engine.attention = %s: %s cannot be used (%s); FA2 runs instead", wish, wanted, obstacle
    )
    return "FA2"


def _activate(wanted: str) -> str | None:
    """Why it could not be activated, or None. torch 2.10 has no such function, later ones do."""
    activate = getattr(attention, "activate_flash_attention_impl", None)
    if activate is None:
        return "this torch cannot exchange its kernel"
    try:
        activate(wanted)
    # not installed, built for another torch, or for another GPU: each package fails in its own way
    except (ImportError, RuntimeError, ValueError, AttributeError, OSError) as error:
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None
