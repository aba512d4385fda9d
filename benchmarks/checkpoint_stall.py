"""How long training stands still for a checkpoint, written beside it and at once, and what that costs the
steps and the memory.

    python benchmarks/checkpoint_stall.py [--hidden 1024] [--layers 4] [--vocabulary 32000] [--stage 2]

One process, one engine of random weights; AdamW's moments and fp32 weights make 12 bytes a parameter, and the
weights themselves 4. Each way saves three times, `--gap` steps apart; figures are of the last two.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import resource
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import nn

from megam3.batch import Progress
from megam3.checkpoint import CheckpointWriter, Retention, RunState
from megam3.config.schema import OptimConfig
from megam3.engine.activations import ActivationMemory
from megam3.engine.deepspeed import Engine, join


class Stack(nn.Module):
    """Linear layers and an embedding: state and time in the proportions of an encoder's."""

    def __init__(self, hidden: int, layers: int, vocabulary: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.Sequential(*(nn.Linear(hidden, hidden) for _ in range(12 * layers)))

    def forward(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Scalar loss."""
        return self.layers(self.embedding(ids_T)).square().mean()


class PeakMemory(threading.Thread):
    """The most resident memory of this process above `base`, looked at every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base, self.peak, self.stopped = resident_bytes(), 0, False

    def run(self) -> None:
        """Until `stopped`."""
        while not self.stopped:
            self.peak = max(self.peak, resident_bytes() - self.base)
            time.sleep(0.02)


def resident_bytes() -> int:
    """Of this process, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    """Print one line a way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("hidden", 1024), ("layers", 2), ("vocabulary", 16000), ("stage", 2), ("gap", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    os.environ.setdefault("LOCAL_RANK", "0")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("megam3").setLevel(logging.INFO)
    device = torch.device("cpu")
    join(device)
    module = Stack(options.hidden, options.layers, options.vocabulary)
    engine = Engine(
        module,
        optim=OptimConfig(lr=1e-4),
        is_head_parameter=lambda name: False,
        ds_config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": options.stage},
            "bf16": {"enabled": False},
            "zero_allow_untested_optimizer": True,
        },
        device=device,
        total_steps=1000,
        activations=ActivationMemory(nn.Module(), False, False),
    )
    print(f"{sum(p.numel() for p in module.parameters()) / 1e6:.1f} M parameters, ZeRO {options.stage}")
    for in_background in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            measure(engine, Path(folder), in_background, options.gap, options.vocabulary)


def step(engine: Engine, number: int, vocabulary: int) -> float:
    """Seconds of one optimizer step."""
    began = time.perf_counter()
    with engine.step_scope(), engine.accumulation(0, 1):
        engine.backward(engine.forward(torch.randint(vocabulary, (512,))), True)
    engine.update(number)
    return time.perf_counter() - began


def measure(engine: Engine, run_dir: Path, in_background: bool, gap: int, vocabulary: int) -> None:
    """Three checkpoints with steps between them."""
    (run_dir / "model").mkdir()
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megam3.checkpoint.writer").addHandler(handler)
    writer = CheckpointWriter(
        str(run_dir),
        engine.save,
        str(run_dir / "model"),
        lambda: Retention(keep=2),
        in_background=in_background,
    )
    quiet = [step(engine, number, vocabulary) for number in range(gap)]
    during: list[float] = []
    memory = PeakMemory()
    memory.start()
    for save in range(1, 4):
        state = RunState(
            progress=Progress(step=save),
            world_size=1,
            zero_stage=engine.stage,
            model_signature="",
            data_fingerprint="",
        )
        writer.save(state)
        while writer.is_writing:
            during.append(step(engine, gap * save, vocabulary))
        writer.finish()
    memory.stopped = True
    found = [re.search(r": ([\d.]+) MiB in ([\d.]+) s, .* waited ([\d.]+) s", line) for line in said]
    sizes, seconds, stalls = zip(*(map(float, match.groups()) for match in found[1:] if match))
    way = "async" if in_background else "plain"
    beside = f"{statistics.median(during):.3f}" if during else "-"
    print(f"{way}: {sizes[0]:.0f} MiB, written in {statistics.mean(seconds):.2f} s", end=", ")
    print(f"training waited {statistics.mean(stalls):.3f} s; step {statistics.median(quiet):.3f} s", end=", ")
    print(f"while writing {beside} s ({len(during)} steps); memory +{memory.peak / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
