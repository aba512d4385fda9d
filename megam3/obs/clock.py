"""Speed and memory: tokens per second, model FLOPs, and which share of the matmul peak of this very machine a
run reaches."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

Item = TypeVar("Item")


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


def forget_peak_memory(device: torch.device | str) -> int:
    """Begin `peak_memory_bytes` anew where the system lets us, and return what is held now: the difference
    later is what came since."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    try:
        # Linux: 5 clears the high-water mark of resident memory (proc(5)); not in every container
        Path("/proc/self/clear_refs").write_text("5")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize()
    except (OSError, ValueError):
        return peak_memory_bytes(device)


@dataclass(frozen=True, kw_only=True)
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
        self.last_wait_seconds = 0.0
        """How long the newest item of `waiting_for` took to come."""
        self._tokens, self._flops, self._waited, self._started = 0, 0, 0.0, time.perf_counter()

    def waiting_for(self, batches: Iterable[Item]) -> Iterator[Item]:
        """The same batches, none of which is None; the time until each one is there counts as waiting."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            item = next(iterator, None)
            self.last_wait_seconds = time.perf_counter() - asked
            self._waited += self.last_wait_seconds
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
        speed = Speed(
            seconds=seconds,
            tokens_per_second=self._tokens / seconds,
            peak_share=share,
            data_wait_share=self._waited / seconds,
        )
        self._tokens, self._flops, self._waited, self._started = 0, 0, 0.0, now
        return speed
