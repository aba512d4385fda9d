"""Which device a rank computes on. Nothing is computed on a CPU by accident: a GPU that is there but cannot
be used is an error.

A task of Slurm sees either all GPUs of its node, and takes the one of its local rank, or
(`--gpus-per-task=1`, `--gpu-bind=single:1`) its own one alone, which is number 0 for every task:

    local rank 3, 8 visible  →  cuda:3           local rank 3, 1 visible  →  cuda:0
"""

import glob
import socket
from collections.abc import Mapping
from itertools import groupby
from typing import Literal

import torch

from megam3.dist import comm
from megam3.errors import ConfigError

SLURM_GPU_VARIABLES = (
    "SLURM_STEP_GPUS",
    "SLURM_JOB_GPUS",
    "SLURM_GPUS_ON_NODE",
    "SLURM_GPUS_PER_TASK",
    "SLURM_GPUS_PER_NODE",
    "SLURM_GPUS",
)
"""Set by Slurm for a task whose job asked for GPUs."""

NVIDIA_DEVICES = "/dev/nvidia[0-9]*"
"""Device files of the GPUs that the driver shows to this process."""


def choose_device(
    wish: Literal["auto", "cpu", "cuda"], local_rank: int, environ: Mapping[str, str]
) -> torch.device:
    """The device of this rank, made current when it is a GPU.

    Args:
        wish: `engine.device`.
        local_rank: rank among the processes of this machine.
        environ: of the process; `DS_ACCELERATOR=cpu` together with a visible GPU counts as a wish for the
        CPU.

    Raises:
        ConfigError: a GPU is wanted, or offered, and cannot be used; or there are fewer GPUs than ranks.
    """
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wish == "cpu" or (wish == "auto" and visible and environ.get("DS_ACCELERATOR") == "cpu"):
        if visible and environ.get("DS_ACCELERATOR") != "cpu":
            rule = "DeepSpeed has chosen the GPU before the recipe was read"
            raise ConfigError(
                "engine.device", "cpu", rule, "start with DS_ACCELERATOR=cpu in the environment"
            )
        return torch.device("cpu")
    if not visible:
        _refuse_unwanted_cpu(wish, environ)
        return torch.device("cpu")
    device = torch.device("cuda", 0 if visible == 1 else local_rank)
    if local_rank >= visible > 1:
        rule = f"local rank {local_rank} has no GPU: torch sees {visible}"
        raise ConfigError("engine.device", wish, rule, "start as many ranks on a node as it has GPUs")
    torch.cuda.set_device(device)
    return device


def device_index(device: torch.device, local_rank: int) -> int:
    """What LOCAL_RANK must say for DeepSpeed to use `device`: its index, or the local rank on CPUs."""
    return local_rank if device.index is None else device.index


def _refuse_unwanted_cpu(wish: str, environ: Mapping[str, str]) -> None:
    offers = [
        f"{name}={environ[name]}" for name in SLURM_GPU_VARIABLES if environ.get(name, "0") not in ("", "0")
    ]
    files = sorted(glob.glob(NVIDIA_DEVICES))
    offers += [f"the machine has {', '.join(files)}"] if files else []
    if wish == "auto" and not offers:
        return
    because = f" although {offers[0]}" if offers else ""
    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    raise ConfigError(
        "engine.device",
        wish,
        f"torch finds no usable GPU{because} (torch {torch.__version__} is a build {build})",
        "install a CUDA build of torch that fits the driver (nvidia-smi says which), ask Slurm for GPUs"
        " (--gpus-per-node), or set engine.device=cpu to train on CPUs",
    )


def describe_devices(device: torch.device) -> list[str]:
    """A line per machine: its ranks and what each computes on; collective, the same on every rank.

    >>> describe_devices(torch.device("cpu"))[0].split(": ", 1)[1]
    'rank 0 on cpu'
    """
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    rows = comm.gather_objects_json([socket.gethostname(), f"{device}{name}"])
    placed = [(host, f"rank {rank} on {where}") for rank, (host, where) in enumerate(rows)]
    return [
        f"{host}: {', '.join(where for _, where in group)}"
        for host, group in groupby(placed, key=lambda row: row[0])
    ]
