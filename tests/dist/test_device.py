"""Which device a rank takes, in environments as Slurm makes them; torch's view of the GPUs is faked."""

import os
import socket

import pytest
import torch

from megam3.dist import comm
from megam3.dist import device as devices
from megam3.dist.device import choose_device, describe_devices, device_index
from megam3.dist.env import discover_ranks
from megam3.errors import ConfigError
from megam3.train import share_threads
from tests.ranks import run_ranks

SLURM_TASK = {
    "SLURM_PROCID": "11",
    "SLURM_LOCALID": "3",
    "SLURM_NTASKS": "16",
    "SLURM_JOB_NODELIST": "gpu[1-2]",
    "SLURM_STEP_ID": "0",
    "SLURM_GPUS_ON_NODE": "8",
}


@pytest.fixture
def machine(monkeypatch):
    """A machine with a number of visible GPUs and device files; returns the list of devices made current."""
    chosen = []

    def make(visible, files=()):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setattr(devices.glob, "glob", lambda pattern: list(files))
        return chosen

    return make


@pytest.mark.parametrize(("visible", "index"), [(8, 3), (4, 3), (1, 0)])
def test_a_slurm_task_takes_the_gpu_of_its_local_rank_or_its_only_one(machine, visible, index):
    chosen = machine(visible)
    ranks = discover_ranks(SLURM_TASK)
    device = choose_device("auto", ranks.local_rank, SLURM_TASK)
    assert chosen == [device] == [torch.device("cuda", index)]
    assert device_index(device, ranks.local_rank) == index, (
        "DeepSpeed reads LOCAL_RANK and must mean the same GPU"
    )


def test_more_ranks_than_gpus_are_refused(machine):
    machine(2)
    with pytest.raises(ConfigError, match="local rank 3 has no GPU: torch sees 2"):
        choose_device("auto", 3, {})


@pytest.mark.parametrize("variable", ["SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS", "SLURM_GPUS_PER_TASK"])
def test_a_cpu_is_refused_when_slurm_gave_gpus(machine, variable):
    machine(0)
    with pytest.raises(ConfigError) as caught:
        choose_device("auto", 0, {variable: "1"})
    assert f"torch finds no usable GPU although {variable}=1" in str(caught.value)
    assert "engine.device=cpu" in str(caught.value)
    assert choose_device("cpu", 0, {variable: "1"}) == torch.device("cpu"), "asked for, it is right"


def test_a_cpu_is_refused_on_a_machine_with_a_gpu(machine):
    machine(0, files=["/dev/nvidia0"])
    with pytest.raises(ConfigError, match="although the machine has /dev/nvidia0"):
        choose_device("auto", 0, {"DS_ACCELERATOR": "cpu"})


def test_a_machine_without_gpus_trains_on_its_cpu_unless_a_gpu_is_asked_for(machine):
    machine(0)
    assert choose_device("auto", 0, {"SLURM_GPUS_ON_NODE": "0"}) == torch.device("cpu")
    assert device_index(torch.device("cpu"), 5) == 5
    with pytest.raises(ConfigError, match="torch finds no usable GPU \\("):
        choose_device("cuda", 0, {})


def test_the_cpu_beside_a_gpu_needs_deepspeeds_consent(machine):
    chosen = machine(1)
    with pytest.raises(ConfigError, match="DS_ACCELERATOR=cpu"):
        choose_device("cpu", 0, {})
    assert choose_device("cpu", 0, {"DS_ACCELERATOR": "cpu"}) == torch.device("cpu")
    assert choose_device("auto", 0, {"DS_ACCELERATOR": "cpu"}) == torch.device("cpu")
    assert not chosen


def _describe() -> list[str]:
    return describe_devices(torch.device("cpu"))


@pytest.mark.ranks
def test_every_rank_is_in_the_line_of_its_machine():
    lines = run_ranks(_describe, 2)
    assert lines[0] == lines[1] == [f"{os.uname().nodename}: rank 0 on cpu, rank 1 on cpu"]


@pytest.mark.parametrize(("given", "expected"), [(None, [4]), ("16", [])])
def test_the_ranks_of_a_machine_share_its_cores_on_any_device(monkeypatch, given, expected):
    """DeepSpeed's launcher says nothing of threads: each of 8 ranks would take all 32."""
    counts: list[int] = []
    host = socket.gethostname()
    monkeypatch.setattr(comm, "gather_objects_json", lambda obj: [host] * 8 + ["another"] * 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)))
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    share_threads()
    assert counts == expected
