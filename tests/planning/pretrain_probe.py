"""RetroMAE steps in a process of their own, and the most memory they held: python -m
tests.planning.pretrain_probe '[{"hidden_size": 32, …}, {…}]', as `tests.planning.memory_probe` does for
retrieval."""

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel

from megam3.batch import Progress, TextBatch
from megam3.config.objective import PretrainConfig
from megam3.config.schema import ModelConfig, OptimConfig
from megam3.engine.activations import ActivationMemory
from megam3.engine.deepspeed import Engine, join, model_construction
from megam3.objectives.pretrain import PretrainObjective
from megam3.packed_texts import pack_texts
from megam3.planning.memory import plan_memory
from megam3.planning.parameters import num_parameters
from megam3.planning.shapes import StepShape, Strategy
from tests.factory import make_tiny_model_folder, random_token_ids
from tests.planning.memory_probe import resident_bytes, shape_of

SMALL = {"hidden_size": 32, "num_layers": 1, "vocab_size": 600, "num_texts": 2, "tokens": 64}


def probe(spec: dict) -> dict[str, int]:
    """Bytes that were planned, and held beyond what the process had before its model."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment |= {"MALLOC_TRIM_THRESHOLD_": "0", "DS_ACCELERATOR": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        specs = [{**case, "folder": f"{folder}/{i}"} for i, case in enumerate((SMALL, spec))]
        command = [sys.executable, "-m", "tests.planning.pretrain_probe", json.dumps(specs)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def main(spec: dict) -> dict[str, int]:
    """Two steps (the second has AdamW's moments), measured from before the model is loaded."""
    make_tiny_model_folder(
        Path(spec["folder"]),
        hidden_size=spec["hidden_size"],
        num_layers=spec["num_layers"],
        heads=False,
    )
    # rows without a piece count as special: the logits are as wide as the embedding matrix all the same
    encoder = AutoModel.from_pretrained(spec["folder"])
    encoder.resize_token_embeddings(spec["vocab_size"])
    encoder.save_pretrained(spec["folder"])
    del encoder
    gc.collect()
    torch.ones(256, 256) @ torch.ones(256, 256)  # the math library's own buffers
    before, section = resident_bytes("VmRSS"), PretrainConfig(bag_of_words_weight=spec.get("bag", 0.0))
    ds_config = {
        "train_batch_size": 1,
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 0},
    }
    objective = PretrainObjective(section)
    with model_construction(ds_config):
        model = objective.load_model(ModelConfig(path=spec["folder"]), torch.float32)
    engine = Engine(
        model,
        optim=OptimConfig(lr=1e-4),
        is_head_parameter=objective.is_head_parameter,
        ds_config=ds_config,
        device=torch.device("cpu"),
        total_steps=4,
        activations=ActivationMemory(model, False, False),
    )
    peaks = []
    for step in range(2):
        ids = random_token_ids([spec["tokens"]] * spec["num_texts"], seed=step)
        batch = TextBatch(
            texts=pack_texts(ids),
            document_offsets_N1=torch.arange(len(ids) + 1),
            rows=torch.arange(len(ids)),
        )
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        with engine.step_scope(), engine.accumulation(0, 1):
            (prepared,) = objective.prepare([batch], Progress(step=step))
            objective.run(engine, prepared, Progress(step=step))
        peaks.append(resident_bytes("VmHWM") - before)
        engine.update(step)
    shape = shape_of(
        model,
        heads=(),
        predictions_per_token=section.predictions_per_token(),
        has_decoder=section.has_decoder(),
        has_bag_of_words=section.has_bag_of_words(),
    )
    assert num_parameters(shape) == sum(p.numel() for p in model.parameters())
    strategy = Strategy(precision_bytes=4, bucket_elements=1000, on_gpu=False)
    work = StepShape(
        num_queries=0, num_passages=spec["num_texts"], query_tokens=0, passage_tokens=spec["tokens"]
    )
    return {"measured": max(peaks), "planned": plan_memory(shape, strategy, work).total_bytes}


if __name__ == "__main__":
    os.environ.setdefault("LOCAL_RANK", "0")
    join(torch.device("cpu"))
    print(json.dumps([main(case) for case in json.loads(sys.argv[1])][-1]))
