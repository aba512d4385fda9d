"""What a launcher starts, once per rank.

deepspeed --num_gpus 8 --module megam3.train RECIPE [key=value…]
python -m megam3.train RECIPE [key=value…]                          one process
"""

import os
import socket
import sys

from megam3.dist.env import discover_ranks, prepare_environment

prepare_environment(os.environ)  # DeepSpeed picks its accelerator and its build folder while it is imported

import torch

from megam3.build import build
from megam3.cli import USER_ERROR_CODE, print_user_error
from megam3.config.check import check_config
from megam3.config.load import load_config
from megam3.dist import comm
from megam3.errors import UserError
from megam3.trainer import StopSignal, train

EXIT_LOST_PEER = 1
"""Exit code of a rank that had to end because another one did."""


def main(argv: list[str] | None = None) -> int:
    """Train one run on this rank; returns the exit code (0, 2 for bad input, 85 to be started again, 1 when another rank has ended)."""
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank")]
    rank = int(os.environ.get("RANK", "0"))
    try:
        ranks = discover_ranks(os.environ)
        rank = ranks.rank
        ranks.export(os.environ)
        if not arguments:
            raise UserError(
                "recipe",
                None,
                "is required",
                "python -m megam3.train RECIPE [key=value…]; recipes: megam3 show-config --list",
            )
        config = load_config(arguments[0], arguments[1:])
        check_config(config, ranks.world_size)
    except UserError as error:
        # found from the command line and the disk alone, so every rank finds the same: one of them says it
        return print_user_error(error) if rank == 0 else USER_ERROR_CODE
    try:
        with StopSignal() as stop:
            device = start_device(ranks.local_rank)
            comm.start(ranks, "nccl" if device.type == "cuda" else "gloo")
            share_threads(device)
            return train(build(config, device), stop)
    except UserError as error:
        return print_user_error(error, f"rank {rank}: " if ranks.world_size > 1 else "")
    except RuntimeError as error:
        if not comm.is_lost_peer(error):
            raise
        print(f"megam3: rank {rank}: another rank has ended; its own message says why", file=sys.stderr)
        return EXIT_LOST_PEER
    finally:
        comm.stop()


def start_device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def share_threads(device: torch.device) -> None:
    """On CPUs, split the cores of a machine evenly between its ranks, unless OMP_NUM_THREADS says otherwise; collective."""
    hosts = comm.gather_objects_json(socket.gethostname())
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // hosts.count(socket.gethostname())))


if __name__ == "__main__":
    sys.exit(main())
