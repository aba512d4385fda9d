"""Planning a billion rows: memory, time to the first batch, time to address random steps. No data is needed;
the index is made up.

    python benchmarks/plan_scale.py [--rows 1e9] [--folder DIR]

The made-up store has 100 000 rows a shard, 100 languages, about 400 lengths a shard with a long tail to 8192
tokens, and the paper's batch sizes for contrastive training (9 984 to 67 200 queries a step) or, with
--unified, those of unified fine-tuning (192 to 1 152). The index is a sparse file.
"""

import argparse
import json
import mmap
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from megam3.config.schema import BatchConfig, DataConfig, DatasetConfig
from megam3.cost import assign_ranks
from megam3.data.assemble import Assembler, TextFrame
from megam3.data.manifest import INDEX_DTYPE, RUN_DTYPE, Manifest
from megam3.data.plan import build_plan
from megam3.data.store import StoredDataset
from megam3.data.strata import DatasetRows

ROWS_PER_SHARD, LENGTHS_PER_SHARD, NUM_LANGUAGES = 100_000, 400, 100


def make_store(folder: Path, num_rows: int) -> None:
    """runs.npy, shard by shard, and an index.npy that is one hole."""
    rng, num_shards = np.random.default_rng(0), num_rows // ROWS_PER_SHARD
    runs = np.lib.format.open_memmap(folder / "runs.npy", "w+", RUN_DTYPE, (num_shards * LENGTHS_PER_SHARD,))
    for shard in range(num_shards):
        lengths = np.unique(np.minimum(8192, (40 * rng.pareto(1.1, 3000) + 20).astype(int)))[
            -LENGTHS_PER_SHARD:
        ]
        lengths = np.pad(lengths, (LENGTHS_PER_SHARD - len(lengths), 0), mode="edge")
        counts = np.full(LENGTHS_PER_SHARD, ROWS_PER_SHARD // LENGTHS_PER_SHARD)
        block = runs[shard * LENGTHS_PER_SHARD : (shard + 1) * LENGTHS_PER_SHARD]
        block["num_rows"], block["longest"], block["language"] = counts, lengths, shard % NUM_LANGUAGES
        block["first_row"] = shard * ROWS_PER_SHARD + np.cumsum(counts) - counts
    np.lib.format.open_memmap(folder / "index.npy", "w+", INDEX_DTYPE, (num_shards * ROWS_PER_SHARD,))


def memory_mb() -> dict[str, float]:
    """Resident memory of this process: its own, and pages of mapped files, which the kernel may drop."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


def measure(folder: Path, table: str, num_steps: int) -> dict:
    """In a process of its own, so that nothing else is in its memory."""
    before, started = memory_mb(), time.perf_counter()
    runs, index = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("runs", "index"))
    index.base.madvise(mmap.MADV_RANDOM)  # as open_dataset does
    languages = [f"l{number}" for number in range(NUM_LANGUAGES)]
    rows = DatasetRows(
        name="d",
        task="t",
        weight=1.0,
        in_batch_negatives=True,
        passages_per_query=1,
        is_text=False,
        languages=languages,
        runs=runs,
        first_row=0,
    )
    config = DataConfig(train=[DatasetConfig(name="d", paths=["x"])], batch=BatchConfig(buckets=table))
    plan = build_plan(config, [rows], 42)
    built = time.perf_counter() - started
    stored = StoredDataset(
        folder=folder,
        manifest=Manifest.model_construct(languages=languages, kind="pair"),
        index=index,
        runs=runs,
        shard_starts=np.array([0, len(index)]),
    )
    assembler = Assembler(
        config, plan, [stored], TextFrame(prefix=(0,), suffix=(2,), instruction_tokens=(0,))
    )
    first = plan.batch(0)
    assign_ranks(assembler.row_costs(first), 96)
    first_batch = time.perf_counter() - started
    steps = np.random.default_rng(1).integers(0, 3 * plan.num_batches, num_steps).tolist()
    times, sizes, processor = [], [], time.process_time()
    for step in steps:
        start = time.perf_counter()
        batch = plan.batch(step)
        times.append(time.perf_counter() - start)
        sizes.append(len(batch.rows))
    processor = time.process_time() - processor
    after = memory_mb()
    return {
        "table": table,
        "rows": len(index),
        "runs": len(runs),
        "batches_per_epoch": plan.num_batches,
        "plan_seconds": round(built, 2),
        "first_batch_seconds": round(first_batch, 2),
        "address_cpu_ms_mean": round(1e3 * processor / num_steps, 3),
        "address_ms_mean": round(1e3 * float(np.mean(times)), 3),
        "address_ms_median": round(1e3 * float(np.median(times)), 3),
        "address_ms_p99": round(1e3 * float(np.quantile(times, 0.99)), 3),
        "queries_per_step_mean": round(float(np.mean(sizes))),
        "own_memory_mb": round(after["RssAnon"], 1),
        "own_memory_of_planning_mb": round(after["RssAnon"] - before["RssAnon"], 1),
        "mapped_file_pages_mb": round(after["RssFile"], 1),
        "peak_resident_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=float, default=1e9)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="keep the made-up index here")
    parser.add_argument("--unified", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    table = "m3_unified" if arguments.unified else "m3_contrastive"
    if arguments.measure:
        print(json.dumps(measure(arguments.folder, table, arguments.steps), indent=1))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch)
        if not (folder / "index.npy").exists():
            make_store(folder, int(arguments.rows))
        options = [
            f"--folder={folder}",
            f"--steps={arguments.steps}",
            *(["--unified"] if arguments.unified else []),
        ]
        subprocess.run([sys.executable, __file__, "--measure", *options], check=True)


if __name__ == "__main__":
    main()
