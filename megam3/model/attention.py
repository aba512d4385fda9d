"""Attention inside each text of a packed stream, registered with transformers as `megam3_packed`.

The encoder runs on one stream of T tokens as a batch of one row; every query may see the keys of its own text
only. Two ways, chosen once per forward pass by `choose_attention` and handed down to every layer:

- "varlen": torch's varlen kernel reads `cu_seqlens` directly, one launch a layer. CUDA in fp16 or bf16
  without attention dropout.
- "runs", everything else: scaled_dot_product_attention over runs of neighbouring texts of equal length, each
  run one batched call without a mask. The backbone puts texts of equal length next to each other first, so
  the number of launches is layers × distinct lengths: 24 × 183 = 4 392 for 65 536 tokens in texts of 16 to
  512.

The choice is not made again in a layer: under autocast the encoder's weights and its queries differ in dtype,
and a layer that chose by its query would read an order of texts that the backbone did not make.

Windows (ModernBERT): transformers hands over `sliding_window` = half-width + 1, and |i - j| <= sliding_window
- 1 inside a text is what its padded masks allow. Long texts are cut into blocks that see their two
  neighbours,
so the cost stays linear in the length.
"""

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

PACKED_ATTENTION = "megam3_packed"
"""Name under which the encoder's config selects this attention."""

_MIN_BLOCK_TOKENS = 64
# torch 2.10 has no scale or window in varlen_attn, later ones do
_VARLEN_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters)


VARLEN_DTYPES = (torch.float16, torch.bfloat16)
"""What the varlen kernel takes."""


@dataclass(frozen=True)
class AttentionChoice:
    """How the layers of one forward pass attend."""

    kernel: Literal["varlen", "runs"]
    obstacle: str = ""
    """Why it is not the varlen kernel, in words."""
    remedy: str = ""
    """What would make it so; empty where nothing in a recipe can."""

    def launches(self, num_layers: int, lengths: Sequence[int]) -> int:
        """Attention kernels of one forward pass over texts of these lengths."""
        return num_layers * (1 if self.kernel == "varlen" else len(set(lengths)))


def is_flash_device(device: torch.device) -> bool:
    """Whether the varlen kernel runs on this device: NVIDIA, compute capability 8.0 or higher."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8


def attention_dropout(config: PretrainedConfig) -> float:
    """The encoder's probability of dropping an attention weight in training, under its family's name."""
    return float(
        getattr(config, "attention_probs_dropout_prob", getattr(config, "attention_dropout", 0.0)) or 0.0
    )


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that queries arrive in: autocast's where it is on, whatever the weights are."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


def fits_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the varlen kernel takes rows of this dtype and width on this device, dropout aside."""
    return is_flash_device(device) and dtype in VARLEN_DTYPES and head_dim % 8 == 0 and head_dim <= 256


def choose_attention(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype, is_training: bool
) -> AttentionChoice:
    """The kernel for a forward pass of an encoder of this config with weights of `dtype` on `device`."""
    dropout = attention_dropout(config) if is_training else 0.0
    head_dim = config.hidden_size // config.num_attention_heads
    dtype = compute_dtype(device, dtype)
    if not is_flash_device(device):
        return AttentionChoice("runs", f"a {device.type} device without varlen kernel")
    if dropout > 0:
        obstacle = f"the encoder's attention dropout of {dropout:g}, which the varlen kernel does not have"
        return AttentionChoice("runs", obstacle, "set model.attention_dropout=0.0")
    if dtype not in VARLEN_DTYPES:
        return AttentionChoice("runs", f"{str(dtype).removeprefix('torch.')}", "set engine.precision=bf16")
    if head_dim % 8 or head_dim > 256:
        return AttentionChoice(
            "runs", f"heads {head_dim} wide: the varlen kernel wants a multiple of 8 up to 256"
        )
    if has_windows(config) and "window_size" not in _VARLEN_PARAMETERS:
        return AttentionChoice(
            "runs", "the encoder's windows, which this torch's varlen kernel does not have"
        )
    return AttentionChoice("varlen")


@dataclass(frozen=True)
class AttentionReport:
    """What a run says about its attention at the start."""

    line: str
    is_slow: bool
    """A device with the varlen kernel does not use it: worth a warning."""


def report_attention(module: nn.Module, device: torch.device) -> AttentionReport:
    """How the encoder inside `module` will attend in training on `device`, and what would make it faster."""
    encoder = next(m for m in module.modules() if isinstance(m, PreTrainedModel))
    choice = choose_attention(encoder.config, device, encoder.dtype, is_training=True)
    layers = encoder.config.num_hidden_layers
    if choice.kernel == "varlen":
        return AttentionReport(f"attention: varlen kernel, {layers} launches a forward pass", False)
    remedy = f"; {choice.remedy}" if choice.remedy else ""
    line = (
        f"attention: {layers} launches for each distinct length of a forward pass's texts, because of"
        f" {choice.obstacle}{remedy}"
    )
    return AttentionReport(line, is_flash_device(device))


def has_windows(config: PretrainedConfig) -> bool:
    """Whether some layers see a window only (ModernBERT)."""
    return "sliding_attention" in (getattr(config, "layer_types", None) or ())


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    lengths: tuple[int, ...],
    max_length: int,
    cu_seqlens: Tensor | None = None,
    kernel: Literal["varlen", "runs"] = "runs",
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of each text over itself.

    Args:
        query, key, value: [1, heads, T, head_dim].
        lengths: of the texts, in the order of the stream; `max_length` is their maximum.
        cu_seqlens: int32 [N + 1], the same on the device; needed by the varlen kernel alone.
        kernel: from `choose_attention`.
        sliding_window: half-width + 1 of a local layer; None: the whole text.

    Returns:
        [1, T, heads, head_dim] and no weights, as transformers' attention interface wants.
    """
    assert attention_mask is None, "packed texts need no mask"
    query_THd, key_THd, value_THd = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    half_window = sliding_window - 1 if sliding_window is not None and sliding_window < max_length else None
    if kernel == "varlen":
        assert cu_seqlens is not None
        assert query.dtype in VARLEN_DTYPES, "chosen for another dtype than the queries have"
        output_THd = _varlen(query_THd, key_THd, value_THd, cu_seqlens, max_length, scale, half_window)
    else:
        output_THd = _equal_length_runs(query_THd, key_THd, value_THd, lengths, scale, dropout, half_window)
    return output_THd.unsqueeze(0), None


def _varlen(
    query_THd: Tensor,
    key_THd: Tensor,
    value_THd: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    half_window: int | None,
):
    options: dict = {}
    if "scale" in _VARLEN_PARAMETERS:
        options["scale"] = scale
    else:
        query_THd = query_THd * (scale * query_THd.shape[-1] ** 0.5)
    if half_window is not None:
        options["window_size"] = (half_window, half_window)
    return varlen_attn(
        query_THd, key_THd, value_THd, cu_seqlens, cu_seqlens, max_length, max_length, **options
    )


@functools.lru_cache(maxsize=64)
def equal_length_runs(lengths: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Neighbouring texts of equal length as (length, count); cached, since every layer asks for the same
    stream.

    >>> equal_length_runs((3, 3, 5, 3))
    ((3, 2), (5, 1), (3, 1))
    """
    return tuple((length, len(list(run))) for length, run in groupby(lengths))


def _equal_length_runs(
    query_THd: Tensor,
    key_THd: Tensor,
    value_THd: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    dropout: float,
    half_window: int | None,
) -> Tensor:
    runs = equal_length_runs(lengths)
    # split, not slices: its backward is one concatenation, where every slice would add a zero-filled gradient
    # of the whole stream
    sizes = [length * count for length, count in runs]
    if len(sizes) > 1:
        queries, keys, values = query_THd.split(sizes), key_THd.split(sizes), value_THd.split(sizes)
    else:
        queries, keys, values = (query_THd,), (key_THd,), (value_THd,)
    outputs = []
    for (length, count), *parts in zip(runs, queries, keys, values):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in parts)
        out = _attend(q, k, v, scale, dropout, half_window)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, half_window: int | None) -> Tensor:
    """q, k, v [texts, heads, length, head_dim], all of one length."""
    length = q.shape[2]
    if half_window is None or length <= half_window + 1:
        return scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    block = max(half_window, _MIN_BLOCK_TOKENS)
    if length > 4 * block:
        return _attend_in_blocks(q, k, v, scale, dropout, half_window, block)
    position = torch.arange(length, device=q.device)
    mask = (position[:, None] - position[None, :]).abs() <= half_window
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)


def _attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float, half_window: int, block: int
) -> Tensor:
    """Banded attention: blocks of `block` >= half_window queries over their own and both neighbouring blocks
    of keys."""
    num_texts, num_heads, length, head_dim = q.shape
    num_blocks = -(-length // block)
    tail = num_blocks * block - length

    def with_neighbours(x: Tensor) -> Tensor:
        blocks = pad(x, (0, 0, block, tail + block)).unflatten(2, (num_blocks + 2, block))
        joined = torch.cat([blocks[:, :, :-2], blocks[:, :, 1:-1], blocks[:, :, 2:]], dim=3)
        return joined.transpose(1, 2).reshape(num_texts * num_blocks, num_heads, 3 * block, head_dim)

    q_blocks = pad(q, (0, 0, 0, tail)).unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)
    first = torch.arange(num_blocks, device=q.device)[:, None, None] * block
    query_position = first + torch.arange(block, device=q.device)[:, None]
    key_position = first + torch.arange(-block, 2 * block, device=q.device)
    near = (query_position - key_position).abs() <= half_window
    # queries of the padded tail may see padding: a row without any key would be NaN, and these rows are cut
    # off below
    real = ((key_position >= 0) & (key_position < length)) | (query_position >= length)
    mask = (near & real).repeat(num_texts, 1, 1).unsqueeze(1)
    out = scaled_dot_product_attention(
        q_blocks, with_neighbours(k), with_neighbours(v), attn_mask=mask, dropout_p=dropout, scale=scale
    )
    return out.unflatten(0, (num_texts, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
