"""Attention inside each text of a packed stream, registered with transformers as `megam3_packed`.

The encoder runs on one stream of T tokens as a batch of one row; every query may see the keys of its own text
only. Two ways, chosen once per forward pass by `choose_attention` and handed down to every layer:

- "varlen": torch's varlen kernel reads `cu_seqlens` directly, one launch a layer. CUDA in fp16 or bf16
  without attention dropout.
- "runs", everything else: scaled_dot_product_attention over runs of neighbouring texts of equal length, each
  run one batched call without a mask. The backbone puts texts of equal length next to each other first, so
  the number of launches is layers × distinct lengths: 24 × 183 = 4 392 for 65 536 tokens in texts of 16 to
  512.

A recipe may also name one of them (`engine.attention`): the encoder carries that wish, see `wish_attention`.

The choice is not made again in a layer: under autocast the encoder's weights and its queries differ in dtype,
and a layer that chose by its query would read an order of texts that the backbone did not make.

Windows (ModernBERT, Gemma 3, Mistral): transformers hands over `sliding_window` = reach to a side + 1, and
|i - j| <= sliding_window - 1 inside a text is what its padded masks allow. Long texts are cut into blocks
that see their neighbours, so the cost stays linear in the length.

Models made left to right (Qwen 3, Llama, ...) attend causally, or in both directions where their config says
so; groups of query heads that share a key head (arXiv 2305.13245) stay grouped: keys are never repeated.
"""

from __future__ import annotations

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


AttentionWish = Literal["auto", "varlen", "sdpa"]
"""auto: the varlen kernel where it runs. varlen: the same; whoever starts a run refuses to go on without it.
sdpa: by runs everywhere."""


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


def wish_attention(module: nn.Module, wish: AttentionWish) -> None:
    """Let every encoder inside `module` attend as wished, from now on."""
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            part.attention_wish = wish  # type: ignore[assignment]


def wished_attention(encoder: nn.Module) -> AttentionWish:
    """What `wish_attention` left on an encoder."""
    return getattr(encoder, "attention_wish", "auto")


def choose_attention(
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    is_training: bool,
    wish: AttentionWish = "auto",
) -> AttentionChoice:
    """The kernel for a forward pass of an encoder of this config with weights of `dtype` on `device`."""
    if wish == "sdpa":
        return AttentionChoice("runs", "engine.attention = sdpa", "set engine.attention=auto")
    dropout = attention_dropout(config) if is_training else 0.0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
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
    wish = wished_attention(encoder)
    choice = choose_attention(encoder.config, device, encoder.dtype, is_training=True, wish=wish)
    layers = encoder.config.num_hidden_layers
    if choice.kernel == "varlen":
        return AttentionReport(f"attention: varlen kernel, {layers} launches a forward pass", False)
    remedy = f"; {choice.remedy}" if choice.remedy else ""
    line = (
        f"attention: {layers} launches for each distinct length of a forward pass's texts, because of"
        f" {choice.obstacle}{remedy}"
    )
    return AttentionReport(line, is_flash_device(device) and wish != "sdpa")


def has_windows(config: PretrainedConfig) -> bool:
    """Whether some layers see a window only (ModernBERT); Mistral lists no layers, all have it."""
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None


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
    causal: bool = False,
    softcap: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Attention of each text over itself.

    Args:
        query, key, value: [1, heads, T, head_dim]; keys and values may have fewer heads, by a whole factor.
        lengths: of the texts, in the order of the stream; `max_length` is their maximum.
        cu_seqlens: int32 [N + 1], the same on the device; needed by the varlen kernel alone.
        kernel: from `choose_attention`.
        sliding_window: reach to a side + 1 of a local layer; None: the whole text.
        causal: tokens see themselves and those before them.

    Returns:
        [1, T, heads, head_dim] and no weights, as transformers' attention interface wants.
    """
    assert attention_mask is None, "packed texts need no mask"
    assert softcap is None, "no packed kernel caps scores; find_packing_problem refuses such encoders"
    query_THd, key_THd, value_THd = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    half_window = None if sliding_window is None else sliding_window - 1
    if kernel == "varlen":
        # a window wider than every text is no window to the kernel, which sees that itself; asked here, it
        # would be one compiled form of the layer more
        assert cu_seqlens is not None
        assert query.dtype in VARLEN_DTYPES, "chosen for another dtype than the queries have"
        output_THd = _varlen(
            query_THd, key_THd, value_THd, cu_seqlens, max_length, scale, half_window, causal
        )
    else:
        if half_window is not None and half_window + 1 >= max_length:
            half_window = None
        # torch 2.13's CPU attention takes 3 to 4 times as long backward in bf16 as in fp32 (28 texts of 96
        # tokens: 114 against 28 ms forward and backward, docs/experiments.md), on a CPU whose matrix
        # products are 10 times as fast in bf16. Forward too: the gradient cache must see the same numbers
        # with and without a graph.
        if query.device.type == "cpu" and query.dtype == torch.bfloat16:
            query_THd, key_THd, value_THd = query_THd.float(), key_THd.float(), value_THd.float()
        rule = _Rule(scale=scale, dropout=dropout, half_window=half_window, causal=causal)
        output_THd = _equal_length_runs(query_THd, key_THd, value_THd, lengths, rule)
        output_THd = output_THd.to(query.dtype)
    return output_THd.unsqueeze(0), None


def _varlen(
    query_THd: Tensor,
    key_THd: Tensor,
    value_THd: Tensor,
    cu_seqlens: Tensor,
    max_length: int,
    scale: float,
    half_window: int | None,
    causal: bool,
):
    options: dict = {}
    if query_THd.shape[1] != key_THd.shape[1]:
        options["enable_gqa"] = True
    if "scale" in _VARLEN_PARAMETERS:
        options["scale"] = scale
    else:
        query_THd = query_THd * (scale * query_THd.shape[-1] ** 0.5)
    if half_window is not None:
        options["window_size"] = (half_window, 0 if causal else half_window)
    elif causal:
        options["window_size"] = (-1, 0)
    return varlen_attn(
        query_THd, key_THd, value_THd, cu_seqlens, cu_seqlens, max_length, max_length, **options
    )


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """What every call of scaled_dot_product_attention of one layer has in common."""

    scale: float
    dropout: float
    half_window: int | None
    """Reach to a side; None: the whole text."""
    causal: bool

    def call(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of one batch; without a mask the kernel itself knows which keys are visible."""
        return scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout,
            is_causal=self.causal and mask is None,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    def near(self, distance: Tensor) -> Tensor:
        """Which (query position - key position) the window holds."""
        assert self.half_window is not None
        lowest = 0 if self.causal else -self.half_window
        return (distance <= self.half_window) & (distance >= lowest)


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
    rule: _Rule,
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
        out = _attend(q, k, v, rule)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _attend(q: Tensor, k: Tensor, v: Tensor, rule: _Rule) -> Tensor:
    """q, k, v [texts, heads, length, head_dim], all of one length."""
    length = q.shape[2]
    if rule.half_window is None or length <= rule.half_window + 1:
        return rule.call(q, k, v, None)
    block = max(rule.half_window, _MIN_BLOCK_TOKENS)
    if length > 4 * block:
        return _attend_in_blocks(q, k, v, rule, block)
    position = torch.arange(length, device=q.device)
    return rule.call(q, k, v, rule.near(position[:, None] - position[None, :]))


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, rule: _Rule, block: int) -> Tensor:
    """Banded attention: blocks of `block` >= half_window queries over their own block of keys, the one before
    and, unless causal, the one after."""
    num_texts, num_heads, length, _ = q.shape
    num_blocks = -(-length // block)
    tail = num_blocks * block - length
    num_seen = 2 if rule.causal else 3

    def with_neighbours(x: Tensor) -> Tensor:
        after = 0 if rule.causal else block
        blocks = pad(x, (0, 0, block, tail + after)).unflatten(2, (num_blocks + num_seen - 1, block))
        joined = torch.cat([blocks[:, :, i : i + num_blocks] for i in range(num_seen)], dim=3)
        return joined.transpose(1, 2).flatten(0, 1)

    q_blocks = pad(q, (0, 0, 0, tail)).unflatten(2, (num_blocks, block)).transpose(1, 2).flatten(0, 1)
    first = torch.arange(num_blocks, device=q.device)[:, None, None] * block
    query_position = first + torch.arange(block, device=q.device)[:, None]
    key_position = first + torch.arange(-block, (num_seen - 1) * block, device=q.device)
    # queries of the padded tail may see padding: a row without any key would be NaN, and these rows are cut
    # off below
    real = ((key_position >= 0) & (key_position < length)) | (query_position >= length)
    mask = (rule.near(query_position - key_position) & real).repeat(num_texts, 1, 1).unsqueeze(1)
    out = rule.call(q_blocks, with_neighbours(k), with_neighbours(v), mask)
    return out.unflatten(0, (num_texts, num_blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
