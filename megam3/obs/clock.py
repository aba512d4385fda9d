"""Speed and memory: tokens per second, model FLOPs, and which share of the matmul peak of this very machine a
run reaches."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Item = TypeVar("Item")


@dataclass(frozen=True)
class EncoderShape:
    """The sizes that decide an encoder's arithmetic."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    multi_vector_dim: int = 0
    """Width of the multi-vector head; 0: without heads."""

    def forward_flops(self, lengths: Sequence[int]) -> int:
        """Floating-point operations of one forward pass over texts of these token counts.

        A matrix product [m,k]x[k,n] is 2·m·k·n. Per token and layer: four H x H projections (8·H²) and two H
        x I (4·H·I); attention adds 2·L·H for the scores and 2·L·H for the weighted sum to each of a text's L
        tokens. The lexical head costs 2·H, the multi-vector head 2·H·C a token. Norms, activations and
        look-ups are left out, as is usual.
        """
        hidden, num_tokens = self.hidden_size, sum(lengths)
        per_token = 8 * hidden**2 + 4 * hidden * self.intermediate_size
        heads = 2 * hidden * (self.multi_vector_dim + 1) if self.multi_vector_dim else 0
        attention = 4 * hidden * sum(length**2 for length in lengths)
        return self.num_layers * (num_tokens * per_token + attention) + num_tokens * heads

    def training_flops(self, lengths: Sequence[int]) -> int:
        """Forward and backward: three times the forward pass. Recomputation is not counted: it is a cost, not
        the model's work."""
        return 3 * self.forward_flops(lengths)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_matmul_peak(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int | None = None,
    min_seconds: float = 0.3,
) -> float:
    """FLOPs per second of the best of many square matrix products, with the threads this process has. Takes
    about `min_seconds`."""
    device = torch.device(device)
    size = size or (8192 if device.type == "cuda" else 1024)
    left, right = (
        torch.randn(size, size, device=device, dtype=dtype),
        torch.randn(size, size, device=device, dtype=dtype),
    )
    product = torch.mm(left, right)  # the first call pays for threads and kernels
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < min_seconds:
        _synchronize(device)
        before = time.perf_counter()
        torch.mm(left, right, out=product)
        _synchronize(device)
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best


def peak_memory_bytes(device: torch.device | str = "cpu") -> int:
    """Most memory held so far: tensors on a CUDA device, the process' resident memory elsewhere."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024  # macOS counts bytes, Linux KiB


@dataclass(frozen=True)
class Speed:
    """What a window of steps amounted to."""

    seconds: float
    tokens_per_second: float
    peak_share: float | None
    """Model FLOPs per second of one rank over the matmul peak of its device; None when the peak was not
    measured."""
    data_wait_share: float
    """Part of the time in which the training loop waited for its next batch."""


class StepClock:
    """Adds up tokens and FLOPs between two readings. `peak_flops_per_second` (of one rank's device) comes
    from `measure_matmul_peak`."""

    def __init__(self, peak_flops_per_second: float | None = None):
        self._peak = peak_flops_per_second
        self._tokens, self._flops, self._waited, self._started = 0, 0, 0.0, time.perf_counter()

    def waiting_for(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches, none of which is None; the time until each one is there counts as waiting."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            item = next(iterator, None)
            self._waited += time.perf_counter() - asked
            if item is None:
                return
            yield item

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time within belongs to no window: evaluation, saving."""
        before = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - before

    def add(self, num_tokens: int, flops: int = 0) -> None:
        """Count work done since the last reading: `num_tokens` over all ranks, `flops` of this rank."""
        self._tokens += num_tokens
        self._flops += flops

    def read(self) -> Speed:
        """Speed since the last reading, and start a new window. The caller has synchronised (a loss was read)
        or accepts the overlap."""
        now = time.perf_counter()
        seconds = max(now - self._started, 1e-9)
        share = self._flops / seconds / self._peak if self._peak else None
        speed = Speed(seconds, self._tokens / seconds, share, self._waited / seconds)
        self._tokens, self._flops, self._waited, self._started = 0, 0, 0.0, now
        return speed
