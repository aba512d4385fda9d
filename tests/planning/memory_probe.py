"""Training steps in a process of their own, and the most memory they held: python -m
tests.planning.memory_probe '[{"hidden_size": 32, …}, {…}]'.

The first case is a small one, which loads what libraries load on first use (some 30 MiB). The figures are the
last one's, and it is alone in its process, because what an earlier engine leaves to be freed later would be
taken for memory that was there before. glibc keeps freed blocks for later; with a small mmap threshold it
hands every tensor straight back, so that resident memory is what lives.
"""

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megam3.batch import Progress
from megam3.config.load import load_config
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import LoraConfig, ModelConfig, OptimConfig
from megam3.dist import comm
from megam3.dist.env import discover_ranks, free_port
from megam3.engine.activations import ActivationMemory
from megam3.engine.deepspeed import Engine, join, model_construction
from megam3.model.backbone import build_backbone, load_encoder_config
from megam3.model.freeze import freeze_parameters
from megam3.model.m3 import is_head_parameter
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective
from megam3.planning.memory import plan_memory
from megam3.planning.parameters import num_parameters
from megam3.planning.recipe import read_model_shape
from megam3.planning.shapes import ModelShape, StepShape, Strategy
from tests.batches import batch_of
from tests.factory import make_tiny_model_folder, random_token_ids

DEFAULTS = {
    "hidden_size": 256,
    "num_layers": 4,
    "num_queries": 4,
    "passages_per_query": 4,
    "query_tokens": 64,
    "passage_tokens": 256,
    "chunk_tokens": None,
    "checkpointing": False,
    "dropout": 0.0,
    "zero_stage": 0,
    "world_size": 1,
    "config": None,
    "freeze": [],
    "lora_rank": 0,
    "multi_vector_hidden": None,
}
"""`config`: of an encoder of another family, whose sizes it decides."""


SMALL: dict[str, Any] = {
    "config": None,
    "freeze": [],
    "lora_rank": 0,
    "multi_vector_hidden": None,
    "hidden_size": 32,
    "num_layers": 1,
    "num_queries": 2,
    "passages_per_query": 2,
    "passage_tokens": 64,
}
"""Loads libraries."""


def probe(change: dict, world_size: int = 1) -> dict:
    """Run DEFAULTS with `change` in fresh processes; bytes rank 0 planned, and held beyond what it had before
    its model."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    environment |= {"DS_ACCELERATOR": "cpu", "MALLOC_ARENA_MAX": "1", "WORLD_SIZE": str(world_size)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryDirectory() as folder:
        measured = {**DEFAULTS, **change, "world_size": world_size, "folder": f"{folder}/model"}
        cases = [{**measured, **SMALL, "folder": f"{folder}/small"}, measured]
        for spec in cases:
            sizes = {
                "hidden_size": spec["hidden_size"],
                "num_layers": spec["num_layers"],
                "num_heads": 4,
                "dropout": spec["dropout"],
            }
            if spec["config"] is not None:
                sizes["hidden_size"] = spec["config"]["hidden_size"]
            make_tiny_model_folder(Path(spec["folder"]), **sizes)
            if spec["config"] is not None:
                put_encoder(Path(spec["folder"]), spec["config"])
        command, place = (
            [sys.executable, "-m", "tests.planning.memory_probe", json.dumps(cases)],
            Path(__file__).resolve().parents[2],
        )
        ranks = []
        for rank in map(str, range(world_size)):
            own = environment | {"RANK": rank, "LOCAL_RANK": rank}
            ranks.append(
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=errors, text=True, env=own, cwd=place
                )
            )
        # a rank that fails must not leave the others waiting for it in a collective
        while any(process.poll() is None for process in ranks) and not any(
            process.poll() for process in ranks
        ):
            time.sleep(0.1)
        failed = any(process.poll() for process in ranks)
        for process in ranks if failed else []:
            process.kill()
        outputs = [process.communicate()[0] for process in ranks]
        errors.seek(0)
        assert not failed, errors.read()
    return json.loads(outputs[0].splitlines()[-1])


def put_encoder(folder: Path, config: dict) -> None:
    """An encoder of `config` at random in the place of the folder's own; its heads and tokenizer stay."""
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": vocab_size}))
    (folder / "model.safetensors").unlink()
    build_backbone(load_encoder_config(str(folder))).save_pretrained(folder)


def resident_bytes(key: str) -> int:
    """VmRSS (now) or VmHWM (the most since it was cleared) of this process."""
    return int(re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024  # type: ignore[union-attr]


def shape_of(model: Any, **fields: Any) -> ModelShape:
    """Sizes of the encoder in `model`, the rest from `fields`."""
    config = model.encoder.config
    return ModelShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        vocab_size=config.vocab_size,
        num_positions=config.max_position_embeddings,
        **fields,
    )


def _groups(spec: dict, seed: int) -> list:
    lengths = [spec["query_tokens"]] + [spec["passage_tokens"]] * spec["passages_per_query"]
    return [random_token_ids(lengths, seed=seed + q) for q in range(spec["num_queries"])]


def _shape(spec: dict, model: Any) -> ModelShape:
    """What the plan counts with: by the recipe for other families, which reads config.json."""
    inner = spec["multi_vector_hidden"]
    if spec["config"] is None and not spec["freeze"] and not spec["lora_rank"] and inner is None:
        return shape_of(model, hidden_dropout=spec["dropout"], attention_dropout=spec["dropout"])
    overrides = [f"model.path={spec['folder']}", f"model.freeze={json.dumps(spec['freeze'])}"]
    overrides += [f"model.lora.rank={spec['lora_rank']}"] if spec["lora_rank"] else []
    overrides += [f"model.multi_vector_hidden={inner}"] if inner else []
    overrides += [f"model.{kind}_dropout={spec['dropout']}" for kind in ("hidden", "attention")]
    return read_model_shape(load_config("unified", overrides))


def main(spec: dict) -> dict:
    """Two steps (the second has AdamW's moments), measured from before the model is loaded."""
    zero = {"stage": spec["zero_stage"], "reduce_bucket_size": 1000, "allgather_bucket_size": 1000}
    ds_config = {
        "train_batch_size": spec["world_size"],
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": False},
        "gradient_clipping": 1.0,
    }
    gc.collect()
    torch.ones(256, 256) @ torch.ones(256, 256)  # the math library's own buffers
    before = resident_bytes("VmRSS")
    with model_construction(ds_config):
        settings = ModelConfig(
            path=spec["folder"],
            freeze=spec["freeze"],
            lora=LoraConfig(rank=spec["lora_rank"]) if spec["lora_rank"] else None,
            multi_vector_hidden=spec["multi_vector_hidden"],
        )
        model = load_m3(spec["folder"], settings)
    freeze_parameters(model, settings.freeze)
    activations = ActivationMemory(model, spec["checkpointing"], False)
    engine = Engine(
        model,
        optim=OptimConfig(lr=1e-4),
        is_head_parameter=is_head_parameter,
        ds_config=ds_config,
        device=torch.device("cpu"),
        total_steps=4,
        activations=activations,
    )
    objective, peaks = UnifiedObjective(UnifiedConfig(), spec["chunk_tokens"]), []
    for step in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        with engine.step_scope(), engine.accumulation(0, 1):
            objective.run(engine, batch_of(_groups(spec, 100 * step + 10 * comm.rank())), Progress(step=step))
        peaks.append(resident_bytes("VmHWM") - before)
        engine.update(step)
    shape = _shape(spec, model)
    assert num_parameters(shape) == sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    strategy = Strategy(
        zero_stage=spec["zero_stage"],
        world_size=spec["world_size"],
        precision_bytes=4,
        checkpointing=spec["checkpointing"],
        bucket_elements=1000,
        on_gpu=False,
    )
    work = StepShape(
        num_queries=spec["num_queries"],
        num_passages=spec["num_queries"] * spec["passages_per_query"],
        query_tokens=spec["query_tokens"],
        passage_tokens=spec["passage_tokens"],
        chunk_tokens=spec["chunk_tokens"],
    )
    plan = plan_memory(shape, strategy, work)
    return {
        "measured": max(peaks),
        "planned": plan.total_bytes,
        "states": plan.states,
        "step": plan.step,
        "peaks": peaks,
    }


if __name__ == "__main__":
    comm.start(discover_ranks(os.environ), "gloo")
    join(torch.device("cpu"))
    torch.set_num_threads(1)
    print(json.dumps([main(spec) for spec in json.loads(sys.argv[1])][-1]))
    # a group that is left to the interpreter's end may abort the process: its threads are still there
    comm.stop()
