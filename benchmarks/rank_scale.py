"""What grows with the number of ranks, measured for one rank of W that are made up: balancing a batch, the
watchdog's look at its peers, the manifest of a checkpoint, the rows that a step gathers.

    python benchmarks/rank_scale.py [--ranks 8 32 96 256 1024]

No rank but this one runs. The store is a real one over loopback with W entries, the batch has 700 queries a
rank as in the paper's contrastive stage on 96 GPUs, the manifest two files a rank and ten besides.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megam3.checkpoint.folders import FileEntry, find_problem, seal
from megam3.cost import assign_ranks, text_cost
from megam3.dist.env import free_port
from megam3.obs.health import RankStatus, Watchdog

QUERIES_PER_RANK = 700
STEP_COLUMNS = 24
"""Figures, counts and times that every rank adds to the gather at a step's end, 8 bytes each."""
DENSE_BYTES = 1024 * 2
TEXTS_PER_RANK = 2 * QUERIES_PER_RANK


def best_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Processor time of the quickest of some calls: other work on the machine only ever adds."""
    times = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        times.append(time.process_time() - began)
    return min(times)


def balance_seconds(world_size: int) -> float:
    """To divide one global batch among the ranks, which every rank does for itself."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(500, rng.pareto(1.1, QUERIES_PER_RANK * world_size) * 40 + 20).astype(np.int64)
    return best_seconds(lambda: assign_ranks(text_cost(lengths), world_size), repeats=3)


def look_seconds(world_size: int) -> tuple[float, float]:
    """To report to the store, which every rank does every five seconds, and to read all others, which a rank
    does only while it stands still; the store's own work is in both."""
    store = dist.TCPStore("127.0.0.1", free_port(), 1, is_master=True, timeout=timedelta(seconds=30))
    for rank in range(world_size):
        status = RankStatus(rank=rank, host="gpu0123", pid=12_345, step=1000, phase="forward", beat=7)
        store.set(str(rank), json.dumps(asdict(status)))
    watchdog = Watchdog(0, world_size, 1800.0, store)
    own = json.dumps(asdict(watchdog.status()))
    return best_seconds(lambda: [store.set("0", own) for _ in range(100)]) / 100, best_seconds(
        lambda: watchdog._look(store)
    )


def manifest_seconds(world_size: int) -> tuple[float, float, int]:
    """To seal a checkpoint, to see that all its files are there, and the manifest's bytes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "engine").mkdir()
        entries = {}
        for number in range(2 * world_size + 10):
            path = f"engine/part_{number:05d}.pt"
            (folder / path).write_bytes(b"x")
            entries[path] = FileEntry(bytes=1, crc32=2_363_233_923)
        began = time.perf_counter()
        seal(str(folder), entries)
        sealed = time.perf_counter() - began
        assert find_problem(str(folder), read=False) is None
        found = best_seconds(lambda: find_problem(str(folder), read=False))
        size = max(path.stat().st_size for path in folder.iterdir() if path.is_file())
        return sealed, found, size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 96, 256, 1024])
    print(
        "| ranks | queries | balance ms | report µs | look ms | seal ms (by the clock) | list ms |"
        " manifest kB | step row kB | dense gather MB |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for ranks in parser.parse_args().ranks:
        report, look = look_seconds(ranks)
        sealed, listed, size = manifest_seconds(ranks)
        figures = [
            f"{1e3 * balance_seconds(ranks):.0f}",
            f"{1e6 * report:.0f}",
            f"{1e3 * look:.1f}",
            f"{1e3 * sealed:.0f}",
            f"{1e3 * listed:.1f}",
            f"{size / 1e3:.0f}",
            f"{ranks * STEP_COLUMNS * 8 / 1e3:.1f}",
            f"{ranks * TEXTS_PER_RANK * DENSE_BYTES / 1e6:.0f}",
        ]
        print(f"| {ranks} | {ranks * QUERIES_PER_RANK:,} | {' | '.join(figures)} |", flush=True)


if __name__ == "__main__":
    main()
