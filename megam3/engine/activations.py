"""Activation checkpointing per encoder layer, and the offload of the checkpointed inputs to host memory.

A checkpointed layer keeps only its input (T × D) and recomputes the rest in the backward pass. At 8192 tokens
and 24 layers those inputs still weigh tens of gigabytes; DeepSpeed's `CheckpointHiddenStatesOffload` copies
them to pinned host memory on a side stream and brings them back before they are needed. We call its two
copies, `offload_input` and `restore_input`, from hooks of our own around each layer,
for four reasons (DeepSpeed 0.19.8, transformers 5.23, read and simulated):

- its own hooks keep every input they brought back until the step ends, all chunks of it: layers × tokens of
  the rank × D × 2 bytes, which is more than without any offload. `restore_input` hands an input over once and
  forgets it.
- its mark sits in the layer's `__call__` and is lost under ZeRO-3, whose hooks hand `forward` a new tensor
  object. We are called with the very tensor that is saved, at every ZeRO stage.
- its pinned buffers are found again by exact shape, and packed chunks hardly ever have as many tokens as an
  earlier one. We send pieces of one size, so that a few buffers serve every chunk; what is left over, less
  than a piece, stays on the device.
- the host runs ahead of the device, and memory of a tensor in flight is free only when the device gets there.
  We let the host run ahead by LAYERS_AHEAD layers and no further; that much work hides every launch.

The input of the last layer stays where it is: the backward pass begins with it.
"""

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.runtime.activation_checkpointing.offload_activations import CheckpointHiddenStatesOffload
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from megam3.errors import ConfigError

PIECE_BYTES = 4 << 20
"""Of one copy: large enough for the full speed of PCIe, small enough that 24 rests of less than a piece do
not matter."""

LAYERS_AHEAD = 2
"""How many layers the host may be ahead of the copies; as many inputs are on the device in passing."""


@dataclass(frozen=True)
class _Away:
    """A layer input on the host: its pieces by DeepSpeed's ids, and the rows left over, on the device."""

    ids: tuple[int, ...]
    rest: Tensor
    shape: torch.Size


class InputStash:
    """Sends layer inputs to the host and brings each back once."""

    def __init__(self, piece_bytes: int = PIECE_BYTES):
        # nothing kept and nothing stashed: what stays on the device is decided here, not by counts of pieces;
        # buffers have one shape, so as many as a chunk needs are all that are ever made
        self._copies = CheckpointHiddenStatesOffload(
            max_fwd_stash_count=0, max_cpu_buffer_pool_count=1 << 20, keep_last_count=0
        )
        self._piece_bytes = piece_bytes
        self._on_their_way: deque = deque()
        self.num_away = 0
        """Inputs sent and not yet brought back."""

    def reset(self) -> None:
        """Forget everything that was not brought back; the host buffers stay for the next step."""
        self._copies.reset()
        self._on_their_way.clear()
        self.num_away = 0

    def send(self, tensor: Tensor) -> Tensor | _Away:
        """Start copying to the host; the tensor itself on a device that is its own host, and for small or
        strided ones."""
        rows_TD = tensor.detach().reshape(-1, tensor.shape[-1])
        rows_of_piece = max(1, self._piece_bytes // (tensor.shape[-1] * tensor.element_size()))
        num_pieces = rows_TD.shape[0] // rows_of_piece
        if not num_pieces or not tensor.is_contiguous():
            return tensor
        pieces = rows_TD[: num_pieces * rows_of_piece].split(rows_of_piece)
        first = self._copies.offload_input(pieces[0])
        if first is None:
            return tensor
        ids = [first, *(self._copies.offload_input(piece) for piece in pieces[1:])]
        self.num_away += 1
        self._pace(self._copies.s1)
        # a copy: a view would keep the whole input
        rest = rows_TD[num_pieces * rows_of_piece :].clone()
        return _Away(tuple(i for i in ids if i is not None), rest, tensor.shape)

    def bring_back(self, saved: Tensor | _Away) -> Tensor:
        """The input on its device again; a second call for the same one fails."""
        if not isinstance(saved, _Away):
            return saved
        pieces = [self._copies.restore_input(i) for i in saved.ids]
        self.num_away -= 1
        self._pace(self._copies.compute_stream)
        return torch.cat([*pieces, saved.rest]).view(saved.shape)

    def _pace(self, stream: Any) -> None:
        """Wait for the copy or layer LAYERS_AHEAD before this one: the queue of the device stays filled, its
        memory does not."""
        self._on_their_way.append(stream.record_event())
        if len(self._on_their_way) > LAYERS_AHEAD:
            self._on_their_way.popleft().synchronize()


class ActivationMemory:
    """Checkpointing and offload of one model; `with activations.step():` spans the forward and backward
    passes of a step."""

    def __init__(self, module: nn.Module, checkpointing: bool, offload: bool, piece_bytes: int = PIECE_BYTES):
        """Switch layer checkpointing on (in place) when asked for.

        Raises:
            ConfigError: the encoder has no layers that can be checkpointed.
        """
        self._stash = InputStash(piece_bytes) if offload else None
        self._inputs_saved = 0
        if checkpointing:
            _checkpoint_layers(module, self._checkpoint)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Everything whose saved inputs may be offloaded; what was not brought back by the end is
        forgotten."""
        self._inputs_saved = 0
        try:
            yield
        finally:
            if self._stash is not None:
                self._stash.reset()

    @property
    def marked_inputs_saved(self) -> int:
        """Layer inputs saved in the current step: offloaded on an accelerator (but the last layer's), kept on
        a CPU, its own host."""
        return self._inputs_saved

    def check_released(self) -> None:
        """Call after each backward pass: whatever a pass does not fetch would stay until the step ends, on
        host and device."""
        away = self._stash.num_away if self._stash is not None else 0
        assert not away, f"{away} offloaded layer inputs were not fetched by the backward pass"

    def _checkpoint(self, function: Callable, *args: Any, is_last_layer: bool) -> Any:
        if not torch.is_grad_enabled():
            return function(*args)
        if self._stash is None:
            return checkpoint(function, *args, use_reentrant=False)
        # an id and no reference: saved tensors keep their hooks, and the hook would keep the input
        stash, input_id = self._stash, id(args[0])

        def pack(tensor: Tensor) -> Any:
            if id(tensor) != input_id:
                return tensor
            self._inputs_saved += 1
            return tensor if is_last_layer else stash.send(tensor)

        # what the layer itself saves goes to the checkpoint's own hooks, which are inside these
        with saved_tensors_hooks(pack, stash.bring_back):
            return checkpoint(function, *args, use_reentrant=False)


def _checkpoint_layers(module: nn.Module, function: Callable) -> None:
    encoder = next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)
    layers = []
    if encoder is not None and encoder.supports_gradient_checkpointing:
        encoder.activation_checkpointing_enable()
        # transformers lets the embeddings' output require a gradient, which only the old, reentrant way
        # needs: frozen layers below the lowest trained one would be saved and walked through
        encoder.disable_input_require_grads()
        # an encoder has no cache, but transformers warns at every layer that it switches it off
        encoder.config.use_cache = False
        # transformers keeps the function to call on each layer; ours is handed the input that is saved
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
        layer._gradient_checkpointing_func = functools.partial(  # type: ignore[assignment]
            function, is_last_layer=layer is layers[-1]
        )
