"""The CUDA branch of packed attention on a CPU: the decision says "varlen", and a naive operator stands for
the kernel.

The operator attends text by text, keeps the kernel's conditions (16-bit types unless told otherwise, int32
offsets, head width) as assertions, and counts its launches.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megam3.model import attention


@dataclass
class StandIn:
    """Launches so far, and the dtypes they came in."""

    launches: int = 0
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)

    def __call__(
        self,
        query_THd: Tensor,
        key_THd: Tensor,
        value_THd: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float | None = None,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        self.launches += 1
        spans = cu_seq_q.tolist()
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert spans == cu_seq_k.tolist()
        assert spans[0] == 0
        assert spans[-1] == query_THd.shape[0]
        assert key_THd.shape == value_THd.shape
        assert enable_gqa == (query_THd.shape[1] != key_THd.shape[1]), "the kernel refuses it otherwise"
        assert max(b - a for a, b in zip(spans, spans[1:])) == max_q == max_k
        for x in (query_THd, key_THd, value_THd):
            assert x.dtype == query_THd.dtype in self.dtypes
            assert x.stride(-1) == 1
            assert x.shape[-1] % 8 == 0
        texts = [
            self._attend(query_THd[a:b], key_THd[a:b], value_THd[a:b], scale, window_size)
            for a, b in zip(spans, spans[1:])
        ]
        return torch.cat(texts).to(query_THd.dtype)

    def _attend(self, query_LHd, key_LHd, value_LHd, scale, window):
        # in fp32, as the kernel accumulates
        heads = [
            x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32))
            for x in (query_LHd, key_LHd, value_LHd)
        ]
        position = torch.arange(query_LHd.shape[0], device=query_LHd.device)
        distance = position[:, None] - position[None, :]
        left, right = (query_LHd.shape[0] if reach < 0 else reach for reach in window)
        mask = (distance <= left) & (-distance <= right)
        with torch.autocast("cpu", enabled=False):
            return scaled_dot_product_attention(
                *heads, attn_mask=mask, scale=scale, enable_gqa=True
            ).transpose(0, 1)


def install(monkeypatch, *, any_dtype: bool = False) -> StandIn:
    """Let every device count as one with the varlen kernel; `any_dtype` also lets fp32 and fp64 through."""
    stand_in = StandIn()
    if any_dtype:
        stand_in.dtypes = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        monkeypatch.setattr(attention, "VARLEN_DTYPES", stand_in.dtypes)
    monkeypatch.setattr(attention, "is_flash_device", lambda device: True)
    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    return stand_in


def attend_halves(
    query_RHd: Tensor,
    key_KHd: Tensor,
    value_KHd: Tensor,
    cu_rows: Tensor,
    cu_keys: Tensor,
    longest_rows: int,
    longest_keys: int,
) -> Tensor:
    """The same kernel where rows read another stream, as RetroMAE's decoder calls it."""
    assert cu_rows.dtype == cu_keys.dtype == torch.int32
    rows, keys = (x.diff().tolist() for x in (cu_rows, cu_keys))
    assert (sum(rows), sum(keys)) == (query_RHd.shape[0], key_KHd.shape[0])
    assert (max(rows), max(keys)) == (longest_rows, longest_keys)
    outputs = []
    for q, k, v in zip(query_RHd.split(rows), key_KHd.split(keys), value_KHd.split(keys), strict=True):
        weights_HRK = (torch.einsum("rhd,khd->hrk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        outputs.append(torch.einsum("hrk,khd->rhd", weights_HRK, v))
    return torch.cat(outputs)
