"""Activation checkpointing per encoder layer, and the offload of the checkpointed inputs to host memory.

A checkpointed layer keeps only its input (T × D) and recomputes the rest in the backward pass. At 8192 tokens and 24 layers those inputs
still weigh tens of gigabytes; DeepSpeed's `CheckpointHiddenStatesOffload` copies them to pinned host memory on a side stream and brings
them back before they are needed. It offloads only tensors that were marked right before the checkpoint saves them.

DeepSpeed places its marks in the layer's `__call__`. Under ZeRO-3 that mark is lost: the partitioning hooks run between `__call__` and
`forward` and hand the layer a new tensor object (seen with DeepSpeed 0.19.8 and transformers 5.23: 4 marks, 0 of them met a saved tensor).
So we mark inside the checkpoint function, which gets the very tensor that is saved, at every ZeRO stage.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.activation_checkpointing.offload_activations import CheckpointHiddenStatesOffload
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from megam3.errors import ConfigError


class ActivationMemory:
    """Holds the offload manager of one model; `with activations.step():` spans the forward and backward passes of a step."""

    def __init__(self, module: nn.Module, checkpointing: bool, offload: bool):
        """Switch layer checkpointing on (in place) when asked for.

        Raises:
            ConfigError: the encoder has no layers that can be checkpointed.
        """
        self._offload = CheckpointHiddenStatesOffload() if offload else None
        if checkpointing:
            _checkpoint_layers(module, self._checkpoint)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Everything whose saved inputs may be offloaded; the manager forgets them at the end, so the backward pass belongs inside."""
        with self._offload or contextlib.nullcontext():
            yield

    @property
    def marked_inputs_saved(self) -> int:
        """Layer inputs the manager saw in the current step: offloaded on an accelerator, passed through on a CPU, which is its own host."""
        if self._offload is None:
            return 0
        stats = self._offload.stats
        return stats.offloaded_tensors + stats.kept_last_tensors + stats.skipped_marked_tensors

    def _checkpoint(self, function: Callable, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(
                *args
            )  # nothing will be saved, and a mark nobody meets would stick to the next tensor at this address
        if self._offload is not None:
            self._offload.mark(args[0])
        return checkpoint(function, *args, use_reentrant=False)


def _checkpoint_layers(module: nn.Module, function: Callable) -> None:
    encoder = next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)
    layers = []
    if encoder is not None and encoder.supports_gradient_checkpointing:
        encoder.activation_checkpointing_enable()
        encoder.config.use_cache = (
            False  # an encoder has no cache, but transformers warns at every layer that it switches it off
        )
        # transformers keeps the function to call on each layer; ours marks the input first
        layers = [
            m
            for m in encoder.modules()
            if getattr(m, "gradient_checkpointing", False) and hasattr(m, "_gradient_checkpointing_func")
        ]
    if not layers:
        name = type(encoder or module).__name__
        raise ConfigError(
            "engine.activation_checkpointing",
            True,
            f"{name} has no layers that can be checkpointed",
            "set engine.activation_checkpointing=false",
        )
    for layer in layers:
        layer._gradient_checkpointing_func = function  # type: ignore[assignment]
