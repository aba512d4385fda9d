"""One megam3 training step (forward, loss, backward, clipping, AdamW) through its own objective and engine; several ranks on request.

Spec: model_folder, texts; optional chunk_tokens (gradient cache), checkpointing, threads, stage; world_size with
one_core_a_rank (every rank has the same amount of work).
"""

import os
import subprocess
import sys
import tempfile

import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from benchmarks.worker import Step, serve
from megam3.batch import Progress, RetrievalBatch, pack_texts
from megam3.config.schema import ModelConfig, OptimConfig, UnifiedConfig
from megam3.engine.activations import ActivationMemory
from megam3.engine.deepspeed import Engine, join, model_construction
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective

RANK, CORE, STORE = "BENCHMARK_RANK", "BENCHMARK_CORE", "BENCHMARK_STORE"
OPTIM = OptimConfig(lr=1e-5, weight_decay=0.01, warmup_ratio=0.0, schedule="constant", clip_norm=1.0)


def make_batch(folder: str, texts: dict, rank: int = 0) -> RetrievalBatch:
    """The texts as one rank's batch; groups are of equal size. Another rank's words are shifted by its number, their lengths are not."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer(texts["queries"] + texts["passages"])["input_ids"]
    assert [len(ids) for ids in token_ids] == [*texts["query_lengths"], *texts["passage_lengths"]], (
        "the tokenizer must give one token a word"
    )
    if rank:
        token_ids = [[i if i < 5 else 5 + (i - 5 + rank) % (texts["vocab_size"] - 5) for i in ids] for ids in token_ids]
    num_queries, num_passages = len(texts["queries"]), len(texts["passages"])
    return RetrievalBatch(
        texts=pack_texts(token_ids),
        group_offsets_Q1=torch.arange(num_queries + 1) * (num_passages // num_queries),
        rows_Q=torch.arange(num_queries),
        passage_hashes_P=torch.arange(num_passages) + rank * num_passages,
    )


def make_engine(spec: dict, world_size: int) -> Engine:
    """The engine as build.py makes it, ZeRO stage 0 unless told otherwise."""
    device = torch.device("cpu")
    join(device)
    ds_config = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": spec.get("stage", 0)},
        "gradient_clipping": OPTIM.clip_norm,
        "bf16": {"enabled": False},
    }
    folder = spec["model_folder"]
    with model_construction(ds_config):
        module = load_m3(folder, ModelConfig(path=folder), special_ids=(0, 1, 2, 3))
    return Engine(module, OPTIM, ds_config, device, 1000, ActivationMemory(module, spec.get("checkpointing", False), False))


def build(spec: dict) -> Step:
    """See the module's docstring."""
    rank, world_size = int(os.environ.get(RANK, "0")), spec.get("world_size", 1)
    os.environ.setdefault("LOCAL_RANK", "0")
    other_ranks = _meet(spec, rank, world_size) if spec.get("one_core_a_rank") else []
    engine, batch = make_engine(spec, world_size), make_batch(spec["model_folder"], spec["texts"], rank)
    objective = UnifiedObjective(UnifiedConfig(), spec.get("chunk_tokens"))
    steps_done = 0

    def step() -> dict:
        nonlocal steps_done
        for process in other_ranks:
            process.stdin.write("\n")
        with engine.step_scope():
            figures = objective.run(engine, batch, Progress(step=steps_done))
        engine.update(steps_done)
        steps_done += 1
        for process in other_ranks:
            _await_answer(process)
        return {"loss": float(figures["loss/total"])}

    for process in other_ranks:
        _await_answer(process)
    return step


def _await_answer(process: subprocess.Popen) -> None:
    """The next answer of another rank; some libraries print while they are imported."""
    assert any(line.startswith("{") for line in process.stdout), "a rank died"


def _meet(spec: dict, rank: int, world_size: int) -> list[subprocess.Popen]:
    """Join the group, each rank on a core of its own; rank 0 starts the others as copies of itself and steps them through their stdin."""
    others = []
    if rank == 0:
        store = os.path.join(tempfile.mkdtemp(), "store")
        cores = sorted(os.sched_getaffinity(0))
        for other in range(world_size - 1, -1, -1):
            os.environ.update({RANK: str(other), CORE: str(cores[other % len(cores)]), STORE: store})
            if other:
                command = [sys.executable, "-m", "benchmarks.sides.megam3_step", sys.argv[1]]
                others.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1))
    os.sched_setaffinity(0, {int(os.environ[CORE])})
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"file://{os.environ[STORE]}", rank=rank, world_size=world_size)
    return others


if __name__ == "__main__":
    serve(build)
