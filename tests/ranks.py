"""Run a test function on several gloo ranks of this machine.

    def _check(scale):  # top level of a test module, so that a fresh process can import it
        return comm.rank() * scale

    run_ranks(_check, 2, 10) == [0, 10]

Ranks are fresh processes, one thread each, meeting through a file; results come back through `torch.save`
files. They fork from a server that has imported torch and done nothing with it, which saves each of them the
import. A rank that fails prints its traceback into the AssertionError of the caller; the others are ended.
"""

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

DEADLINE_SECONDS = 900.0
"""Reached by ranks that hang alone: the slowest tests take three minutes on two cores with other work."""


def _enter(
    index: int,
    function: Callable,
    world_size: int,
    folder: str,
    arguments: tuple,
    environment: dict[str, str],
) -> None:
    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(RANK=str(index), LOCAL_RANK=str(index), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=index,
            world_size=world_size,
            timeout=timedelta(seconds=DEADLINE_SECONDS),
        )
        torch.save(function(*arguments), f"{folder}/result-{index}.pt")
    except BaseException:
        Path(f"{folder}/error-{index}.txt").write_text(traceback.format_exc())
        os._exit(1)
    dist.destroy_process_group()


def _wait(processes: list, folder: str) -> str | None:
    """None when all ranks ended well, else the story of those that failed."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while any(p.exitcode is None for p in processes) and time.monotonic() < deadline:
        if any(p.exitcode for p in processes):
            break
        time.sleep(0.02)
    if all(p.exitcode == 0 for p in processes):
        return None
    time.sleep(
        0.5
    )  # let the others write theirs: a rank that lost its peer often speaks before the peer that failed
    errors = {
        path.stem.replace("error-", "rank "): path.read_text()
        for path in sorted(Path(folder).glob("error-*.txt"))
    }
    if errors:
        own_fault_first = sorted(errors.items(), key=lambda error: "Connection " in error[1])
        return "\n".join(f"{rank} failed:\n{text}" for rank, text in own_fault_first)
    return (
        f"ranks ended with {[p.exitcode for p in processes]} (None: still running after {DEADLINE_SECONDS} s)"
    )


def run_ranks(function: Callable, world_size: int, *arguments: Any) -> list:
    """`function(*arguments)` on `world_size` ranks; their results in rank order (tensors, numbers, strings,
    lists, dicts)."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed"])
        arguments_of = [
            (rank, function, world_size, folder, arguments, dict(os.environ)) for rank in range(world_size)
        ]
        processes = [context.Process(target=_enter, args=each) for each in arguments_of]
        for process in processes:
            process.start()
        try:
            story = _wait(processes, folder)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                process.join()
        assert story is None, story
        return [torch.load(f"{folder}/result-{r}.pt", weights_only=True) for r in range(world_size)]
