"""Encoder layers compiled by torch.compile: one region a layer, made once for batches of every shape.

A layer is compiled, not the model: layers are alike, so the first one's code serves all of them, and what
depends on a batch's lengths (order, offsets, pooling, losses) stays outside. Sizes are symbols from the start
(`dynamic`), so a number of tokens or texts that was not there before compiles nothing. What is compiled once
each:

    kinds of layers in an encoder (XLM-R 1, ModernBERT 3: the first, global ones, those with a window)
      × with a graph and without (the gradient cache's first pass)
      + the kinds once more for evaluation, which runs uncompiled under activation checkpointing
      + once more for a stream of one token

A part that cannot be compiled ends the run at its first step instead of running in pieces (`fullgraph`).
Under activation checkpointing the checkpoint stays around the compiled layer, so that a layer is one unit of
recomputation and offload as before.

The gradient cache runs a layer without a graph and then with one, and both must compute the same (`OPTIONS`).
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx.experimental import _config as shapes
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from megam3.errors import ConfigError

MAX_GRAPHS = 64
"""Compiled forms of one layer function that torch keeps; its own bound of 8 is below what three kinds of
layers need with a graph, without one and in evaluation."""


OPTIONS = {
    # Inductor's own generator would draw other numbers with a graph than without
    "fallback_random": True,
    # else fused operators leave out roundings to 16 bits, but for what a graph saves: in bf16 the two forms
    # of a layer part by its rounding (1 % of a tiny model's hidden states); the price is casts in registers
    "emulate_precision_casts": True,
}
"""Of Inductor. With them a layer rounds where the uncompiled one does, and with a graph as without."""


def compile_layers(module: nn.Module, backend: str = "inductor") -> int:
    """Compile the layers of the encoder inside `module`, in place, each at its first call; returns how many.

    Call it after `ActivationMemory`, whose checkpoints stay around the compiled layers.

    Args:
        backend: of torch.compile. Tests on CPUs take `aot_eager`, which traces alike and generates no code.

    Raises:
        ConfigError: the encoder's layers are not transformers' usual ones.
    """
    encoder = next((m for m in module.modules() if isinstance(m, PreTrainedModel)), module)
    layers = [m for m in encoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        rule = f"{type(encoder).__name__} has no layers that can be compiled one by one"
        raise ConfigError("engine.compile_layers", True, rule, "set engine.compile_layers=false")
    # sizes of the first batch that are equal by chance (63 texts, heads 64 wide) are not taken for one
    shapes.use_duck_shape = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
    options: dict[str, Any] = {"backend": backend, "dynamic": True, "fullgraph": True}
    if backend == "inductor":
        options["options"] = OPTIONS
    compiled = functools.lru_cache(maxsize=None)(functools.partial(torch.compile, **options))
    for layer in layers:
        if layer.gradient_checkpointing:
            checkpoint: Any = layer._gradient_checkpointing_func
            around = functools.partial(_inside_checkpoint, checkpoint, compiled)
            layer._gradient_checkpointing_func = around  # type: ignore[assignment]
        else:
            layer.compile(**options)
    return len(layers)


def _inside_checkpoint(
    checkpoint: Callable, compiled: Callable[[Callable], Callable], function: functools.partial, *args: Any
) -> Any:
    """transformers hands over the layer's `forward` with all but the checkpointed input bound to it."""
    return checkpoint(functools.partial(compiled(function.func), *function.args, **function.keywords), *args)
