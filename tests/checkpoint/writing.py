"""A checkpoint without an engine: what tests of folders and their order need."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megam3.batch import Progress
from megam3.checkpoint import Retention, RunState, save_checkpoint
from megam3.dist import comm

STATE = RunState(
    progress=Progress(step=3, tokens=50),
    world_size=2,
    zero_stage=3,
    model_signature="model-a",
    data_fingerprint="plan:a",
    layout="2 ranks, stage 3",
    recipe={"name": "x"},
)


def write_rank_file(folder: str, num_bytes: int = 256) -> list[str]:
    """What an engine does: a file of this rank below engine/; returns its name."""
    os.makedirs(f"{folder}/engine", exist_ok=True)
    name = f"engine/rank-{comm.rank()}.bin" if comm.is_grouped() else "engine/weights.bin"
    Path(folder, name).write_bytes(bytes(range(256)) * (num_bytes // 256))
    return [name]


def save_step(run_dir: Path, step: int, keep: int = 3, write: Callable | None = None, **options: Any) -> str:
    """A checkpoint of `step` in run_dir, whose engine file grows with the step; returns its folder."""
    model_files = run_dir / "model"
    if comm.is_main() and not model_files.exists():
        model_files.mkdir(parents=True)
        (model_files / "config.json").write_text("{}")
    fence = options.pop("fence", None)
    return save_checkpoint(
        str(run_dir),
        replace(STATE, progress=Progress(step=step)),
        write or (lambda folder: write_rank_file(folder, 256 * (step % 1000))),
        str(model_files),
        Retention(keep=keep, **options),
        fence=fence,
    )
