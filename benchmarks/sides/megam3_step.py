"""One megam3 training step (forward, loss, backward, clipping, AdamW) through its own objective and engine;
several ranks on request.

Spec: model_folder, texts; optional chunk_tokens (gradient cache), checkpointing, threads, stage;
num_processes, each on one core and with
the same amount of work: ranks of one run or, without `talk`, runs of one rank each.
"""

import os

import torch
from transformers import AutoTokenizer

from benchmarks.ranks import await_answer, meet, own_rank
from benchmarks.worker import Step, serve
from megam3.batch import Progress, RetrievalBatch
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import ModelConfig, OptimConfig
from megam3.engine.activations import ActivationMemory
from megam3.engine.deepspeed import Engine, join, model_construction
from megam3.model.m3 import is_head_parameter
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective
from megam3.packed_texts import pack_texts

OPTIM = OptimConfig(lr=1e-5, weight_decay=0.01, warmup_ratio=0.0, schedule="constant", clip_norm=1.0)


def make_batch(folder: str, texts: dict, rank: int = 0) -> RetrievalBatch:
    """The texts as one rank's batch; groups are of equal size. Another rank's words are shifted by its
    number, their lengths are not."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer(texts["queries"] + texts["passages"])["input_ids"]
    assert [len(ids) for ids in token_ids] == [*texts["query_lengths"], *texts["passage_lengths"]], (
        "the tokenizer must give one token a word"
    )
    if rank:
        token_ids = [
            [i if i < 5 else 5 + (i - 5 + rank) % (texts["vocab_size"] - 5) for i in ids] for ids in token_ids
        ]
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
    return Engine(
        module,
        optim=OPTIM,
        is_head_parameter=is_head_parameter,
        ds_config=ds_config,
        device=device,
        total_steps=1000,
        activations=ActivationMemory(module, spec.get("checkpointing", False), False),
    )


def build(spec: dict) -> Step:
    """See the module's docstring."""
    rank, num_processes, talk = own_rank(), spec.get("num_processes", 0), spec.get("talk", True)
    os.environ.setdefault("LOCAL_RANK", "0")
    other_ranks = meet("megam3_step", rank, num_processes, talk) if num_processes else []
    world_size = num_processes if num_processes and talk else 1
    engine, batch = make_engine(spec, world_size), make_batch(spec["model_folder"], spec["texts"], rank)
    objective = UnifiedObjective(UnifiedConfig(), spec.get("chunk_tokens"))
    steps_done = 0

    def step() -> dict:
        nonlocal steps_done
        for process in other_ranks:
            process.stdin.write("\n")
        with engine.step_scope():
            figures = objective.run(engine, batch, Progress(step=steps_done))
        update = engine.update(steps_done)
        steps_done += 1
        for process in other_ranks:
            await_answer(process)
        return {"loss": float(figures["loss/total"]), "grad_norm": update.grad_norm}

    for process in other_ranks:
        await_answer(process)
    return step


if __name__ == "__main__":
    serve(build)
