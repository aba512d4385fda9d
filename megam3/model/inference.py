"""A model that is only read: loaded from a folder, and token ids through it, batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from megam3.batch import Representations
from megam3.config.schema import ModelConfig
from megam3.model.device import DTYPES, Precision
from megam3.model.m3 import M3Model, represent
from megam3.model.pretrained import held_heads, load_m3
from megam3.packed_texts import length_batches, pack_texts

_HOST_BATCH_TOKENS, _DEVICE_BATCH_TOKENS = 4096, 32768
"""Tokens encoded at a time. A GPU needs many to be filled; a CPU is 10 % faster on few, whose activations
stay near its caches (`python -m benchmarks.encode` compares)."""


def load_model(path: str, device: torch.device, precision: Precision) -> M3Model:
    """The model in a folder, with those heads whose weights are there.

    Raises:
        ConfigError, CheckpointError: see `held_heads` and `load_m3`.
    """
    model = load_m3(path, ModelConfig(path=path), heads=held_heads(path), dtype=DTYPES[precision])
    return model.to(device)


def offered_heads(model: M3Model) -> tuple[str, ...]:
    """The heads that can be asked for; dense vectors need no weights and always can."""
    return ("dense", *(head for head in model.heads if head != "dense"))


def suited_batch_tokens(devices: Iterable[torch.device]) -> int:
    """Tokens encoded at a time unless a caller says otherwise."""
    is_host = all(device.type == "cpu" for device in devices)
    return _HOST_BATCH_TOKENS if is_host else _DEVICE_BATCH_TOKENS


def represent_batches(
    model: M3Model,
    token_ids: Sequence[Sequence[int] | np.ndarray],
    batch_tokens: int,
    heads: Sequence[str],
) -> Iterator[tuple[list[int], Representations]]:
    """Batches of (positions in `token_ids`, Representations on the model's device), see `length_batches`;
    without gradients, and in evaluation mode until the last one."""
    device = next(model.encoder.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for indices in length_batches([len(ids) for ids in token_ids], batch_tokens):
            texts = pack_texts([token_ids[i] for i in indices])  # type: ignore[misc]
            if "lexical" in heads and model.lexical_head is not None:
                texts = texts.with_pairs(model.special_ids)
            texts = texts.to(device)
            # entered per batch: between two batches the caller's code runs, under its own gradient mode
            with torch.no_grad():
                representations = represent(model, texts, heads)
            yield indices, representations
    finally:
        model.train(was_training)
