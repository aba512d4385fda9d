"""The engine on a device against a plain torch loop on the CPU: `pytest -m gpu` where there is a GPU, and the
same bodies with the CPU as the device everywhere."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megam3.batch import Progress
from megam3.config.schema import ModelConfig
from megam3.dist.env import free_port
from megam3.engine.schedule import learning_rate_factor
from megam3.model.m3 import is_head_parameter
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective
from tests.batches import batch_of, make_groups
from tests.compiled_operators import compile_adamw, needs_compiler
from tests.engine.test_engine import OBJECTIVE, OPTIM
from tests.factory import make_tiny_model_folder
from tests.gpu.device_cases import LONG_STEPS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SECONDS = 300.0


@pytest.fixture(scope="module", params=DEVICES)
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device is there")
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(make_tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny"))


def start(device: str, case: str, folder: str, run: Path, world_size: int) -> list[subprocess.Popen]:
    """One process a rank; what they say goes to run/CASE-RANK.log."""
    if device == "cuda" and torch.cuda.device_count() < world_size:
        pytest.skip(f"{world_size} CUDA devices are needed, {torch.cuda.device_count()} are there")
    port, processes = free_port(), []
    for rank in range(world_size):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(value) for name, value in places.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "DS_ACCELERATOR": device}
        with open(run / f"{case}-{rank}.log", "w") as log:
            command = [sys.executable, "-m", "tests.gpu.device_cases", device, case, folder, str(run)]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
    return processes


def result_of(device: str, case: str, folder: str, run: Path, world_size: int = 1) -> dict:
    processes = start(device, case, folder, run, world_size)
    try:
        codes = [process.wait(timeout=SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(codes), (run / f"{case}-0.log").read_text()[-2000:]
    return json.loads((run / f"{case}.json").read_text())


def plain_losses(folder: str, steps: int) -> list[float]:
    """The same steps in fp32 on the CPU, without DeepSpeed and without engine code."""
    model = load_m3(folder, ModelConfig(path=folder)).train()
    groups = [
        {
            "params": [p],
            "peak": OPTIM.head_lr if is_head_parameter(n) else OPTIM.lr,
            "weight_decay": OPTIM.weight_decay if p.dim() > 1 else 0.0,
        }
        for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=OPTIM.betas, eps=OPTIM.eps)
    total = 2 * LONG_STEPS

    class Plain:
        forward = staticmethod(model.__call__)
        backward = staticmethod(lambda loss, is_last: loss.backward())

    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        batch = batch_of(make_groups(4, seed=step % 4))
        figures = UnifiedObjective(OBJECTIVE).run(Plain(), batch, Progress(step=step))
        losses.append(float(figures["loss/total"]))
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(
                step, total, OPTIM.warmup_ratio, OPTIM.schedule
            )
        optimizer.step()
    return losses


def test_every_stage_equals_plain_torch(device, folder, tmp_path):
    expected = plain_losses(folder, 3)
    for name, losses in result_of(device, "stages", folder, tmp_path).items():
        torch.testing.assert_close(losses, expected, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_offload_changes_no_loss(device, folder, tmp_path):
    losses = result_of(device, "offload", folder, tmp_path)
    torch.testing.assert_close(losses["True"], losses["False"], rtol=1e-5, atol=1e-6)


def test_the_varlen_kernel_and_runs_train_alike(device, folder, tmp_path):
    losses = result_of(device, "attention", folder, tmp_path)
    # bf16: the ways differ by where they round to 8 bits
    torch.testing.assert_close(losses["varlen"], losses["sdpa"], rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_compiled_layers_train_alike_and_nothing_is_compiled_for_a_shape(device, folder, tmp_path):
    for result in result_of(device, "compiled", folder, tmp_path).values():
        # Inductor rounds to bf16 where torch does, and sums in another order
        torch.testing.assert_close(result["compiled"], result["plain"], rtol=2e-2, atol=2e-2)
        first, last = result["graphs"]
        # one kind of layer, with a graph and without
        assert first == last == 2


@needs_compiler
@pytest.mark.slow
def test_states_in_host_memory_move_weights_alike(device, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", compile_adamw(device))
    expected = plain_losses(folder, 3)
    for name, losses in result_of(device, "offloaded_optimizer", folder, tmp_path).items():
        torch.testing.assert_close(losses, expected, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.slow
def test_fifty_steps_in_bf16_follow_fp32(device, folder, tmp_path):
    losses = torch.tensor(result_of(device, "long_run", folder, tmp_path)["losses"])
    expected = torch.tensor(plain_losses(folder, len(losses)))
    # the model learns, and bf16 with fp32 master weights learns the same: 8 bits of mantissa at τ = 0.2
    assert expected[-4:].mean() < 0.8 * expected[:4].mean()
    assert (losses - expected).abs().mean() < 0.05 * expected.mean()


@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_saved_on_one_device_goes_on_on_two(device, folder, tmp_path):
    saved = result_of(device, "save", folder, tmp_path)
    resumed = result_of(device, "resume", folder, tmp_path, world_size=2)
    torch.testing.assert_close(resumed["on"], saved["on"], rtol=2e-4, atol=2e-5)


@pytest.mark.ranks
@pytest.mark.slow
def test_memory_that_ends_on_one_rank_ends_that_rank_and_says_so(device, folder, tmp_path):
    processes = start(device, "out_of_memory", folder, tmp_path, world_size=2)
    try:
        assert processes[1].wait(timeout=SECONDS) == 1
        assert "out of memory" in (tmp_path / "out_of_memory-1.log").read_text()
        # the launcher ends the rest when one rank ends; here nobody does, and rank 0 may only wait or fail
        deadline = time.monotonic() + 5.0
        while processes[0].poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        assert processes[0].poll() != 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
