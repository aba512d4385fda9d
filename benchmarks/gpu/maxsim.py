"""A piece: MaxSim forward and backward, beside the plain product of the same rows.

python -m benchmarks.gpu.maxsim SPEC.json ANSWER.json
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megam3.obs.clock import measure_matmul_peak
from megam3.scoring.maxsim import maxsim_scores

ROUNDS = 5


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of ROUNDS after one that compiles."""
    taken = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])


def main() -> None:
    """See the module's docstring."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    device = torch.device(spec["device"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    counts = [(spec["num_queries"], spec["query_rows"]), (spec["num_passages"], spec["passage_rows"])]
    rows = [
        torch.nn.functional.normalize(torch.randn(texts * length, spec["width"], device=device), dim=1)
        .to(dtype)
        .requires_grad_()
        for texts, length in counts
    ]
    offsets = [torch.arange(texts + 1, device=device) * length for texts, length in counts]
    lengths = [(length,) * texts for texts, length in counts]

    def forward() -> torch.Tensor:
        return maxsim_scores(
            rows[0], offsets[0], rows[1], offsets[1], query_counts=lengths[0], passage_counts=lengths[1]
        )

    forward_seconds = _seconds(forward, device)
    scores = forward()
    upstream = torch.ones_like(scores)
    backward_seconds = _seconds(
        lambda: torch.autograd.grad(scores, rows, upstream, retain_graph=True), device
    )
    # the product alone: the backward pass reads 1/L of it
    flops = 2 * rows[0].shape[0] * rows[1].shape[0] * spec["width"]
    peak = measure_matmul_peak(device, dtype)
    figures = {
        "forward_seconds": forward_seconds,
        "backward_seconds": backward_seconds,
        "peak_share": flops / (forward_seconds + backward_seconds) / peak,
    }
    Path(sys.argv[2]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
