"""A piece that runs in a peer's own environment: its training step, or its MaxSim forward and backward.

    python -m benchmarks.gpu.peer SPEC.json ANSWER.json

The step is built by the peer's file in benchmarks/sides, on the model and texts of megam3's own pieces; under
bf16 autocast on a GPU, as the peers' trainers run. Imports torch and the peer, nothing of megam3.

A figure is worth what was computed for it: a step whose loss or gradient is nothing, and scores or gradients
that are not MaxSim's, end the piece.
"""

import importlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.texts import Texts, equal_lengths
from benchmarks.worker import peak_rss_bytes

WARMUPS, STEPS = 2, 5


def median_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of STEPS after WARMUPS."""
    seconds = []
    for _ in range(WARMUPS + STEPS):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARMUPS:])


def measure_step(spec: dict, device: torch.device) -> dict:
    """A training step over the spec's texts."""
    num_queries, num_passages = spec["num_queries"], spec["num_queries"] * spec["passages_per_query"]
    texts = Texts(
        equal_lengths(num_queries, spec["query_tokens"]),
        equal_lengths(num_passages, spec["passage_tokens"]),
        spec["vocab_size"],
    )
    side = importlib.import_module(f"benchmarks.sides.{spec['side']}")
    step = side.build({**spec, "texts": texts.as_json()})

    def in_precision() -> dict:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return step()

    first = check_step(in_precision())
    seconds = median_seconds(in_precision, device)
    num_tokens = sum(texts.query_lengths) + sum(texts.passage_lengths)
    return {
        "queries": num_queries,
        "seconds": seconds,
        "tokens_per_second": num_tokens / seconds,
        "peak_bytes": _peak_bytes(device),
        "loss": first["loss"],
    }


def check_step(figures: dict) -> dict:
    """The figures of a step, if it was one.

    Raises:
        RuntimeError: a loss or a gradient norm that is zero or not finite.
    """
    for name in ("loss", "grad_norm"):
        if not (math.isfinite(figures[name]) and figures[name] > 0):
            raise RuntimeError(f"the first step has {name} = {figures[name]}: this is no training step")
    return figures


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_rss_bytes()


def find_maxsim(package: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The package's scores of every query with every passage, [Q, rows, C] and [P, rows, C] to [Q, P], with a
    backward pass."""
    if package == "flash-maxsim":
        return importlib.import_module("flash_maxsim").flash_maxsim_batched_train
    if package == "late-interaction-kernels":
        return importlib.import_module("late_interaction_kernels.autograd").maxsim
    raise ValueError(f"no adapter for {package}")


def check_maxsim(score: Callable, rows: list[torch.Tensor]) -> None:
    """Scores and gradients beside the plain product's, in fp32 of the same rows.

    Raises:
        RuntimeError: they differ by more than 16-bit products explain.
    """
    wide = [row.detach().float().requires_grad_() for row in rows]
    expected_QP = torch.einsum("qac,pbc->qpab", *wide).amax(-1).sum(-1)
    # of mixed signs, so that the sums in the gradients do not hide a passage
    upstream_QP = torch.arange(expected_QP.numel(), device=expected_QP.device).cos().view_as(expected_QP)
    ours_QP = score(*rows)
    found = torch.autograd.grad(ours_QP, rows, upstream_QP.to(ours_QP.dtype))
    wanted = torch.autograd.grad(expected_QP, wide, upstream_QP)
    pairs = zip(("scores", "query gradients", "passage gradients"), (ours_QP, *found), (expected_QP, *wanted))
    for name, ours, theirs in pairs:
        error = ((ours.float() - theirs).norm() / theirs.norm()).item()
        # bf16 has 8 bits; where two rows are equally near another one may win
        if not error < 2e-2:
            raise RuntimeError(f"{name} differ from the plain product's by {error:.1%}")


def interpret_triton() -> None:
    """Let Triton's kernels run on a CPU, slowly: its interpreter, the first of the tunings untimed, and
    answers to what the packages ask of a CUDA device. Before the kernels are imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    tuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    tuner.do_bench = staticmethod(lambda call, quantiles: [0.0] * len(quantiles))
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment, misc]
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(name="interpreter")  # type: ignore[assignment, return-value]


def measure_maxsim(spec: dict, device: torch.device) -> dict:
    """MaxSim of equal rows, as `benchmarks.gpu.maxsim` times megam3's."""
    if device.type == "cpu":
        interpret_triton()
    score = find_maxsim(spec["package"])
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [(spec["num_queries"], spec["query_rows"]), (spec["num_passages"], spec["passage_rows"])]
    rows = [
        torch.nn.functional.normalize(torch.randn(*shape, spec["width"], device=device), dim=2)
        .to(dtype)
        .requires_grad_()
        for shape in shapes
    ]
    check_maxsim(score, rows)
    forward = median_seconds(lambda: score(*rows), device)
    scores = score(*rows)
    upstream = torch.ones_like(scores)
    backward = median_seconds(lambda: torch.autograd.grad(scores, rows, upstream, retain_graph=True), device)
    return {"forward_seconds": forward, "backward_seconds": backward}


def main() -> None:
    """See the module's docstring."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    device = torch.device(spec["device"])
    figures = (measure_step if "side" in spec else measure_maxsim)(spec, device)
    Path(sys.argv[2]).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
