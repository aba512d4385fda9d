"""torch's own operators of variable-length attention, forward and backward, with bodies for the CPU.

Other than `varlen_stand_in`, which takes the place of `varlen_attn`, this leaves all that torch has around
the kernel where it is: `varlen_attn` itself, its registration with autograd, and what its compiler knows of
it.

    forward    S = scale · Q Kᵀ     L = log Σ exp S     O = exp(S − L) V
    backward   P = exp(S − L)     dV = Pᵀ dO     dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O))
               dQ = scale · dS K     dK = scale · dSᵀ Q

(arXiv 2307.08691, section 2.3; the backward pass reads O and L as the kernel's does.) Text by text, in fp32
or wider.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.attention import varlen

from megam3.model import attention


def _texts(spans: list[int], *streams_THd: Tensor) -> Iterator[list[Tensor]]:
    """Each text's part of every stream, heads first, in fp32 or wider."""
    for start, stop in zip(spans, spans[1:]):
        yield [
            x[start:stop].transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32)) for x in streams_THd
        ]


def _hidden(length: int, window: list[int] | None) -> Tensor:
    """Which (query, key) pairs the window leaves out."""
    left, right = [length if reach < 0 else reach for reach in window or (-1, -1)]
    position = torch.arange(length)
    distance = position[:, None] - position[None, :]
    return (distance > left) | (-distance > right)


def _scores(query_HLd: Tensor, key_HLd: Tensor, scale: float | None, window: list[int] | None) -> Tensor:
    scale = query_HLd.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query_HLd @ key_HLd.transpose(1, 2)
    return scores.masked_fill(_hidden(scores.shape[-1], window), -torch.inf)


def _repeated(query_THd: Tensor, *shared_THd: Tensor) -> tuple[int, list[Tensor]]:
    """Query heads to a key head, and keys and values repeated for them."""
    group = query_THd.shape[1] // shared_THd[0].shape[1]
    return group, [x.repeat_interleave(group, 1) for x in shared_THd]


def _forward(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *rest
):
    spans = cu_seq_q.tolist()
    assert spans == cu_seq_k.tolist()
    assert max(b - a for a, b in zip(spans, spans[1:])) == max_q == max_k
    wide = torch.promote_types(query.dtype, torch.float32)
    output_THd = torch.empty_like(query)
    logs_HT = torch.empty(query.shape[1], query.shape[0], dtype=wide)
    _, (key, value) = _repeated(query, key, value)
    for start, stop, (q, k, v) in zip(spans, spans[1:], _texts(spans, query, key, value)):
        scores = _scores(q, k, scale, window_size)
        logs_HT[:, start:stop] = scores.logsumexp(-1)
        output_THd[start:stop] = (scores.softmax(-1) @ v).transpose(0, 1).to(query.dtype)
    return output_THd, logs_HT, torch.zeros(2, dtype=torch.uint64)


def _backward(
    grad_out,
    query,
    key,
    value,
    out,
    lse,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    is_causal,
    rng_state,
    scale=None,
    window_size=None,
):
    spans = cu_seq_q.tolist()
    factor = query.shape[-1] ** -0.5 if scale is None else scale
    group, (keys, values) = _repeated(query, key, value)
    parts: list[list[Tensor]] = []
    texts = _texts(spans, query, keys, values, out, grad_out)
    for start, stop, (q, k, v, o, grad) in zip(spans, spans[1:], texts):
        weights = (_scores(q, k, scale, window_size) - lse[:, start:stop, None]).exp()
        inner = weights * (grad @ v.transpose(1, 2) - (grad * o).sum(-1, keepdim=True))
        parts.append([factor * inner @ k, factor * inner.transpose(1, 2) @ q, weights.transpose(1, 2) @ grad])
    grad_q, grad_k, grad_v = (torch.cat(part, 1).transpose(0, 1) for part in zip(*parts))
    grad_k, grad_v = (x.unflatten(1, (key.shape[1], group)).sum(2) for x in (grad_k, grad_v))
    gradients = ((grad_q, query), (grad_k, key), (grad_v, value))
    return tuple(grad.to(like.dtype).contiguous() for grad, like in gradients)


varlen._varlen_attn.register_kernel("cpu")(_forward)
varlen._varlen_attn_backward.register_kernel("cpu")(_backward)


def install(monkeypatch) -> None:
    """Let every device count as one with the varlen kernel, which also takes fp32 and fp64."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    monkeypatch.setattr(attention, "VARLEN_DTYPES", dtypes)
    monkeypatch.setattr(attention, "is_flash_device", lambda device: True)
