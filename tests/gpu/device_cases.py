"""What `pytest -m gpu` runs on a device, in processes of its own, and on a CPU as well, so that every line
has run before it meets a GPU.

    RANK=0 WORLD_SIZE=1 … python -m tests.gpu.device_cases DEVICE CASE MODEL_FOLDER RUN_FOLDER

The result of rank 0 goes to RUN_FOLDER/CASE.json. A process of its own, because DeepSpeed settles on an
accelerator when it is imported.
"""

import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from megam3.batch import Progress
from megam3.config.schema import ModelConfig
from megam3.dist import comm
from megam3.engine.activations import ActivationMemory
from megam3.engine.adamw import Kind, choose_adamw
from megam3.engine.compiled import compile_layers
from megam3.engine.deepspeed import Engine, join, model_construction
from megam3.model.attention import wish_attention
from megam3.model.m3 import is_head_parameter
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective
from tests.batches import make_groups, split_over_ranks
from tests.engine.test_engine import OBJECTIVE, OPTIM, ds_config
from tests.gpu import varlen_operator

LONG_STEPS = 50
RESUME_STEPS = 2
"""On one rank before the checkpoint, and on two ranks after it."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """This rank, as `comm.start` wants it."""

    rank: int
    world_size: int
    master_addr: str
    master_port: int


def make_engine(
    folder: str,
    device: torch.device,
    stage: int,
    *,
    offload: bool = False,
    bf16: bool = False,
    zero: dict | None = None,
    adamw: Kind = "fused",
) -> Engine:
    """As tests/engine makes it, on any device."""
    config = ds_config(stage, bf16=bf16)
    config["zero_optimization"] |= zero or {}
    config["zero_force_ds_cpu_optimizer"] = False
    with model_construction(config):
        dtype = torch.bfloat16 if bf16 else torch.float32
        module = load_m3(folder, ModelConfig(path=folder), dtype=dtype)
    return Engine(
        module,
        optim=OPTIM,
        is_head_parameter=is_head_parameter,
        ds_config=config,
        device=device,
        total_steps=2 * LONG_STEPS,
        activations=ActivationMemory(module, offload, offload),
        adamw=adamw,
    )


def train(engine: Engine, count: int, chunk_tokens: int | None = None, first: int = 0) -> list[float]:
    """Losses of `count` steps over the same groups at any number of ranks."""
    objective, losses = UnifiedObjective(OBJECTIVE, chunk_tokens), []
    for step in range(first, first + count):
        batch = split_over_ranks(make_groups(4, seed=step % 4), comm.rank(), comm.world_size())
        with engine.step_scope(), engine.accumulation(0, 1):
            figures = objective.run(engine, batch.to(engine.device), Progress(step=step))
        losses.append(float(comm.all_reduce_sum(figures["loss/total"])) / comm.world_size())
        engine.update(step)
    return losses


def stages(folder: str, device: torch.device, run: Path) -> dict:
    """Three steps at each ZeRO stage, one pass and chunks."""
    chunks = {"one pass": None, "chunks": 60}
    return {
        f"{stage}, {name}": train(make_engine(folder, device, stage), 3, chunk_tokens)
        for stage in (0, 1, 2, 3)
        for name, chunk_tokens in chunks.items()
    }


def offload(folder: str, device: torch.device, run: Path) -> dict:
    """With layer inputs saved in host memory, and without."""
    return {
        str(offloads): train(make_engine(folder, device, 1, offload=offloads), 3, 60)
        for offloads in (False, True)
    }


def long_run(folder: str, device: torch.device, run: Path) -> dict:
    """LONG_STEPS in bf16 on the device, the kernels a GPU takes included."""
    return {"losses": train(make_engine(folder, device, 1, bf16=True), LONG_STEPS)}


def attention(folder: str, device: torch.device, run: Path) -> dict:
    """Steps in bf16 by the varlen kernel and by runs."""
    losses = {}
    for wish in ("varlen", "sdpa"):
        engine = make_engine(folder, device, 1, bf16=True)
        wish_attention(engine.module, wish)
        losses[wish] = train(engine, 3, 60)
    return losses


def compiled(folder: str, device: torch.device, run: Path) -> dict:
    """Steps in chunks with compiled layers and without, with checkpointing and offload and without; how many
    forms were compiled in the first step and in all."""
    results: dict = {}
    for offloads in (False, True):
        plain = train(make_engine(folder, device, 1, offload=offloads, bf16=True), 6, 60)
        engine = make_engine(folder, device, 1, offload=offloads, bf16=True)
        compile_layers(engine.module, "inductor" if device.type == "cuda" else "aot_eager")
        torch._dynamo.reset()
        counters.clear()
        losses, graphs = train(engine, 2, 60), counters["stats"]["unique_graphs"]
        losses += train(engine, 4, 60, first=2)
        results[str(offloads)] = {
            "plain": plain,
            "compiled": losses,
            "graphs": [graphs, counters["stats"]["unique_graphs"]],
        }
    return results


def offloaded_optimizer(folder: str, device: torch.device, run: Path) -> dict:
    """ZeRO 2 and 3 with the optimizer's states in host memory, by torch's AdamW and by DeepSpeed's."""
    zero = {"offload_optimizer": {"device": "cpu", "pin_memory": device.type == "cuda"}}
    return {
        f"{stage} {kind}": train(make_engine(folder, device, stage, zero=zero, adamw=choose_adamw(kind)), 3)
        for stage in (2, 3)
        for kind in ("fused", "deepspeed_cpu")
    }


def save(folder: str, device: torch.device, run: Path) -> dict:
    """The first leg: a checkpoint after RESUME_STEPS."""
    engine = make_engine(folder, device, 1)
    losses = train(engine, RESUME_STEPS)
    engine.save(str(run / "checkpoint"))
    # the uninterrupted run goes on from here
    return {"losses": losses, "on": train(engine, RESUME_STEPS, first=RESUME_STEPS)}


def resume(folder: str, device: torch.device, run: Path) -> dict:
    """The second leg, on any number of ranks."""
    engine = make_engine(folder, device, 1)
    engine.load_elastic(str(run / "checkpoint"))
    return {"on": train(engine, RESUME_STEPS, first=RESUME_STEPS)}


def out_of_memory(folder: str, device: torch.device, run: Path) -> dict:
    """The last rank's memory ends in its second step, while the others wait for it."""
    engine = make_engine(folder, device, 1)
    train(engine, 1)
    if comm.rank() == comm.world_size() - 1:
        if device.type != "cuda":
            raise torch.OutOfMemoryError("out of memory (said by the test)")
        torch.cuda.set_per_process_memory_fraction(1e-6, device)
        torch.cuda.empty_cache()
        torch.empty(1 << 30, device=device)
    return {"losses": train(engine, 1, first=1)}


CASES = {
    case.__name__: case
    for case in (
        stages,
        offload,
        long_run,
        attention,
        compiled,
        offloaded_optimizer,
        save,
        resume,
        out_of_memory,
    )
}


def main() -> None:
    """See the module's docstring."""
    kind, case, folder, run = sys.argv[1:]
    place = Place(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        master_addr=os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]),
    )
    device = torch.device("cpu")
    if kind == "cpu" and case in ("attention", "compiled"):
        varlen_operator.install(pytest.MonkeyPatch())
    if kind == "cuda":
        device = torch.device("cuda", place.rank)
        torch.cuda.set_device(device)
    comm.start(place, "nccl" if kind == "cuda" else "gloo")
    join(device)
    try:
        result = CASES[case](folder, device, Path(run))
    except Exception:  # whatever it was, peers must not wait for this rank
        traceback.print_exc()
        comm.leave(1)
        raise
    if place.rank == 0:
        (Path(run) / f"{case}.json").write_text(json.dumps(result))
    comm.stop()


if __name__ == "__main__":
    main()
