"""Several ranks of one side, each on a core of its own (cores are shared where there are too few).

Rank 0 is the process that the comparison started; it starts the others as copies of itself and steps them
through their stdin.
"""

import os
import subprocess
import sys
import tempfile

import torch.distributed as dist

RANK, CORE, STORE = "BENCHMARK_RANK", "BENCHMARK_CORE", "BENCHMARK_STORE"


def own_rank() -> int:
    """This process's rank; 0 for the one that the comparison started."""
    return int(os.environ.get(RANK, "0"))


def meet(module: str, rank: int, num_processes: int, talk: bool = True) -> list[subprocess.Popen]:
    """Join the group of `benchmarks.sides.MODULE`, whose spec argv[1] names; on rank 0, the processes of the
    other ranks.

    talk: False: there is no group, the processes only run at the same time. What they lose, the machine
    takes.
    """
    others = []
    if rank == 0:
        store = os.path.join(tempfile.mkdtemp(), "store")
        cores = sorted(os.sched_getaffinity(0))
        for other in range(num_processes - 1, -1, -1):
            os.environ.update({RANK: str(other), CORE: str(cores[other % len(cores)]), STORE: store})
            if other:
                command = [sys.executable, "-m", f"benchmarks.sides.{module}", sys.argv[1]]
                others.append(
                    subprocess.Popen(
                        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
                    )
                )
    os.sched_setaffinity(0, {int(os.environ[CORE])})
    os.environ["LOCAL_RANK"] = str(rank)
    if talk:
        dist.init_process_group(
            "gloo", init_method=f"file://{os.environ[STORE]}", rank=rank, world_size=num_processes
        )
    return others


def await_answer(process: subprocess.Popen) -> None:
    """The next answer of another rank; some libraries print while they are imported."""
    assert any(line.startswith("{") for line in process.stdout), "a rank died"
