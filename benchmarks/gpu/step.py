"""A piece: unified training steps of one rank, timed, with peak memory as planned and as measured.

    RANK=… WORLD_SIZE=… python -m benchmarks.gpu.step SPEC.json ANSWER.json

The step is the recipe's: the objective, the engine and the optimizer that `megam3 train` makes.
"""

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoConfig

from benchmarks.gpu.pieces import StepSpec
from benchmarks.sides.megam3_step import OPTIM
from megam3.batch import Progress, RetrievalBatch
from megam3.config.deepspeed import build_deepspeed_config
from megam3.config.load import parse_config
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import ModelConfig
from megam3.dist import comm
from megam3.engine.activations import ActivationMemory
from megam3.engine.deepspeed import Engine, join, model_construction
from megam3.engine.kernels import activate_attention
from megam3.model.m3 import encoder_shape, is_head_parameter
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective
from megam3.obs.clock import forget_peak_memory, measure_matmul_peak, peak_memory_bytes
from megam3.packed_texts import pack_texts, pin_memory
from megam3.planning.memory import plan_memory
from megam3.planning.shapes import ModelShape, StepShape, Strategy

WARMUPS, STEPS = 2, 5
MAX_QUERIES = {"cuda": 4096, "cpu": 2}
"""Where growing ends: memory does on a GPU; on a CPU nothing would."""
GROW_SECONDS = 300.0
"""Of growing: with the gradient cache memory hardly ends, and a piece has ten minutes (the runner's
PIECE_SECONDS)."""
SPECIAL_IDS = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Place:
    """This rank, as `comm.start` wants it."""

    rank: int
    world_size: int
    master_addr: str
    master_port: int


def read_place() -> Place:
    """From the variables that the runner sets."""
    return Place(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        master_addr=os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]),
    )


def make_batch(spec: StepSpec, num_queries: int, vocab_size: int, seed: int) -> RetrievalBatch:
    """Random texts of the wanted lengths, as the loader hands them over."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return [0, *torch.randint(5, vocab_size, (length - 2,), generator=generator).tolist(), 2]

    num_passages = num_queries * spec.passages_per_query
    texts = [text(spec.query_tokens) for _ in range(num_queries)]
    texts += [text(spec.passage_tokens) for _ in range(num_passages)]
    return RetrievalBatch(
        texts=pack_texts(texts).with_pairs(SPECIAL_IDS),
        group_offsets_Q1=torch.arange(num_queries + 1) * spec.passages_per_query,
        rows_Q=torch.arange(num_queries),
        passage_hashes_P=torch.arange(num_passages) + seed * num_passages,
    )


def make_engine(spec: StepSpec, folder: str, device: torch.device, world_size: int) -> Engine:
    """The engine as build.py makes it, by the stage's own template: bf16 on a GPU, fp32 on a CPU."""
    on_gpu = device.type == "cuda"
    recipe = {
        "name": "benchmark",
        "model": {"path": folder},
        "data": {"train": [{"name": "made", "paths": ["none"]}], "batch": {"global_queries": world_size}},
        "optim": OPTIM.model_dump(),
        "engine": {"template": f"zero{spec.stage}"},
        "train": {"steps": 1},
    }
    ds_config = build_deepspeed_config(parse_config(recipe), world_size, has_gpu=on_gpu)
    with model_construction(ds_config):
        dtype = torch.bfloat16 if on_gpu else torch.float32
        module = load_m3(folder, ModelConfig(path=folder), special_ids=SPECIAL_IDS, dtype=dtype)
    return Engine(
        module,
        optim=OPTIM,
        is_head_parameter=is_head_parameter,
        ds_config=ds_config,
        device=device,
        total_steps=1000,
        activations=ActivationMemory(module, spec.checkpointing, spec.activation_offload),
    )


def planned_bytes(spec: StepSpec, folder: str, world_size: int, on_gpu: bool) -> int:
    """Peak memory of this step as `megam3 plan-memory` counts it."""
    config = AutoConfig.from_pretrained(folder)
    model = ModelShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        num_positions=config.max_position_embeddings,
    )
    strategy = Strategy(
        zero_stage=spec.stage,
        world_size=world_size,
        precision_bytes=2 if on_gpu else 4,
        checkpointing=spec.checkpointing,
        activation_offload=spec.activation_offload,
        on_gpu=on_gpu,
    )
    step = StepShape(
        num_queries=spec.num_queries,
        num_passages=spec.num_queries * spec.passages_per_query,
        query_tokens=spec.query_tokens,
        passage_tokens=spec.passage_tokens,
        chunk_tokens=spec.chunk_tokens,
    )
    return plan_memory(model, strategy, step).total_bytes


def measure(spec: StepSpec, engine: Engine, vocab_size: int) -> float:
    """Seconds of a step: median of STEPS after WARMUPS, from the pinned batch to the updated weights."""
    on_gpu = engine.device.type == "cuda"
    batch = make_batch(spec, spec.num_queries, vocab_size, seed=comm.rank())
    batch = pin_memory(batch) if on_gpu else batch
    objective = UnifiedObjective(UnifiedConfig(), spec.chunk_tokens)
    seconds = []
    for number in range(WARMUPS + STEPS):
        started = time.perf_counter()
        with engine.step_scope():
            objective.run(engine, batch.to(engine.device), Progress(step=number))
        engine.update(number)
        if on_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[WARMUPS:])


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Steps that ran."""

    spec: StepSpec
    seconds: float
    peak_bytes: int
    ended_by: str | None = None
    """What kept a growing batch from growing on: `memory`, or `time` or `bound` where more would have
    fitted."""


def grow(spec: StepSpec, engine: Engine, vocab_size: int) -> Measured:
    """Double the queries until memory ends, or until twice as many would take too long; the last that ran."""
    best: Measured | None = None
    started = time.perf_counter()
    while spec.num_queries <= MAX_QUERIES[engine.device.type]:
        before = time.perf_counter()
        # what an attempt that fails holds is not what the last that ran held
        forget_peak_memory(engine.device)
        try:
            seconds = measure(spec, engine, vocab_size)
        except RuntimeError as error:
            if best is None or not is_out_of_memory(error):
                raise
            return replace(best, ended_by="memory")
        peak = peak_memory_bytes(engine.device)
        best = Measured(spec=spec, seconds=seconds, peak_bytes=peak, ended_by="bound")
        now = time.perf_counter()
        if now - started + 2 * (now - before) > GROW_SECONDS:
            return replace(best, ended_by="time")
        spec = replace(spec, num_queries=2 * spec.num_queries)
    assert best is not None
    return best


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of torch's allocator, or of a library beside it that found none left."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def main() -> None:
    """See the module's docstring."""
    given = json.loads(Path(sys.argv[1]).read_text())
    kind, folder = given.pop("device"), given.pop("model_folder")
    spec, place = StepSpec(**given), read_place()
    device = torch.device(kind, place.rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    comm.start(place, "nccl" if kind == "cuda" else "gloo")
    join(device)
    dtype = torch.bfloat16 if kind == "cuda" else torch.float32
    peak = measure_matmul_peak(device, dtype)
    attention = activate_attention("auto", device)
    engine = make_engine(spec, folder, device, place.world_size)
    vocab_size = AutoConfig.from_pretrained(folder).vocab_size
    if spec.grow:
        measured = grow(spec, engine, vocab_size)
    else:
        # the products that measured the peak, and loading, are no part of a step
        forget_peak_memory(device)
        seconds = measure(spec, engine, vocab_size)
        measured = Measured(spec=spec, seconds=seconds, peak_bytes=peak_memory_bytes(device))
    spec, seconds = measured.spec, measured.seconds
    lengths = make_batch(spec, spec.num_queries, vocab_size, seed=0).texts.lengths
    flops = encoder_shape(engine.module).training_flops(lengths)  # type: ignore[arg-type]
    if place.rank == 0:
        figures = {
            "queries": spec.num_queries,
            "seconds": seconds,
            "tokens_per_second": place.world_size * sum(lengths) / seconds,
            "peak_share": flops / seconds / peak,
            "peak_bytes": measured.peak_bytes,
            "ended_by": measured.ended_by,
            "attention": attention,
            "planned_bytes": planned_bytes(spec, folder, place.world_size, kind == "cuda"),
        }
        Path(sys.argv[2]).write_text(json.dumps(figures))
    comm.stop()


if __name__ == "__main__":
    main()
