"""Two ranks under DeepSpeed's launcher on a machine without a compiler, without ninja, and with a HOME that
cannot be written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megam3.dist.env import free_port
from tests.launches import make_workplace

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import os
from megam3.dist.env import discover_ranks, prepare_environment
prepare_environment(os.environ)
import torch
ranks = discover_ranks(os.environ)
assert not __import__("shutil").which("g++") and not os.path.exists(os.environ["HOME"] + "/.cache")
torch.distributed.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world_size)
from megam3.config.deepspeed import build_deepspeed_config
from megam3.engine.deepspeed import join
from tests.recipes import make_config
join(torch.device("cpu"))
import deepspeed
for template in ("zero1", "zero3_offload"):
    torch.manual_seed(0)
    module = torch.nn.Linear(4, 1)
    config = build_deepspeed_config(make_config(engine__template=template), ranks.world_size)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config,
    dist_init_required=False)
    for _ in range(2):
        loss = engine(torch.ones(2, 4)).square().mean()
        engine.backward(loss)
        engine.step()
    with open(f"{os.environ['PROBE_OUT']}/{template}.{ranks.rank}", "w") as stream:
        stream.write(f"{ranks.source} {ranks.local_rank} {loss.item():.6f}")
torch.distributed.destroy_process_group()
"""


def run_bare(folder: Path, *program: str) -> None:
    """Start two ranks of a program where PATH holds a few shell commands and nothing else."""
    programs = folder / "bin"
    programs.mkdir()
    for name in ("sh", "bash", "env", "uname"):
        found = shutil.which(name)
        assert found
        (programs / name).symlink_to(found)
    environ = {
        "PATH": str(programs),
        "HOME": "/dev/null",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PROBE_OUT": str(folder),
    }
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_accelerators",
        "2",
        "--master_port",
        str(free_port()),
        *program,
    ]
    done = subprocess.run(
        launcher, env=environ, cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.ranks
def test_deepspeed_needs_no_compiler_and_no_home(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    run_bare(tmp_path, str(program))
    for template in ("zero1", "zero3_offload"):
        first, second = ((tmp_path / f"{template}.{rank}").read_text().split() for rank in range(2))
        assert (first[:2], second[:2]) == (["launcher", "0"], ["launcher", "1"])
        assert first[2] == second[2]


@pytest.mark.ranks
def test_a_whole_run_needs_no_compiler_and_no_home(tmp_path: Path) -> None:
    place = make_workplace(tmp_path / "place")
    run_bare(tmp_path, "--module", "megam3.train", place.recipe, "engine.template=zero3", "train.steps=2")
    assert [row["step"] for row in place.rows("run")] == [1, 2]
    assert (place.run("run") / "checkpoints" / "latest").read_text() == "step-000002"
