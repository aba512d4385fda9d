"""Preparation against the tokenizer alone: MB of text per second, same texts, same number of processes.

    python benchmarks/prepare_throughput.py MODEL_FOLDER DATA.jsonl [--processes 1] [--repeats 3]

"Tokenizer alone" encodes the same texts, already in memory, in groups of the same size. Rates are given by
the clock on the wall and by processor time (summed over processes, starts and imports included for
`prepare_data`): on a machine shared with others only the second means much.
"""

import argparse
import json
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from megam3.config.schema import BatchConfig, DataConfig, DatasetConfig
from megam3.data.encode import RECORDS_PER_CALL
from megam3.data.prepare import prepare_data
from megam3.data.tokenizer import Tokenizer, load_tokenizer


def tokenize(tokenizer_json: str, path: str, part: int, parts: int) -> np.ndarray:
    """(wall, processor) seconds for every `parts`-th record."""
    tokenizer = Tokenizer.from_json(tokenizer_json)
    records = [json.loads(line) for line in Path(path).read_text().splitlines()[part::parts]]
    starts = range(0, len(records), RECORDS_PER_CALL)
    groups = [
        [text for record in records[start : start + RECORDS_PER_CALL] for text in texts_of(record)]
        for start in starts
    ]
    before = usage()
    for group in groups:
        tokenizer._backend.encode_batch_fast(group, add_special_tokens=True)
    return usage() - before


def prepare(tokenizer_json: str, config: DataConfig, processes: int, unit_bytes: int) -> np.ndarray:
    """(wall, processor) seconds of one preparation."""
    tokenizer, before = Tokenizer.from_json(tokenizer_json), usage()
    with tempfile.TemporaryDirectory() as folder:
        prepare_data(
            config, tokenizer, folder, num_processes=processes if processes > 1 else 0, unit_bytes=unit_bytes
        )
        return usage() - before


def usage() -> np.ndarray:
    """(wall, processor) seconds so far, of this process and its ended children."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return np.array(
        [time.perf_counter(), own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime]
    )


def texts_of(record: dict) -> list[str]:
    return (
        [record["text"]]
        if "text" in record
        else [record["query"], *record["pos"], *(record.get("neg") or [])]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.model)
    records = [json.loads(line) for line in Path(arguments.data).read_text(encoding="utf-8").splitlines()]
    megabytes = sum(len(text.encode()) for record in records for text in texts_of(record)) / 1e6
    config = DataConfig(
        train=[DatasetConfig(name="d", paths=[arguments.data])], batch=BatchConfig(global_queries=8)
    )
    processes, text = arguments.processes, tokenizer.to_json()
    unit_bytes = max(1 << 20, Path(arguments.data).stat().st_size // (4 * processes))
    alone, whole = [], []
    for _ in range(arguments.repeats):
        # a fresh pool each time: ended children of the one before must not be counted
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(tokenize, text, arguments.data, part, processes) for part in range(processes)]
            measured = np.array([job.result() for job in jobs])
            alone.append([measured[:, 0].max(), measured[:, 1].sum()])
            whole.append(pool.submit(prepare, text, config, processes, unit_bytes).result())
    rates = megabytes / np.median([alone, whole], axis=1)
    print(f"{megabytes:.1f} MB of text, {processes} processes, medians of {arguments.repeats}")
    print(f"{'MB/s':<18}{'wall':>8}{'processor':>11}")
    for name, (wall, processor) in zip(("tokenizer alone", "prepare_data"), rates):
        print(f"{name:<18}{wall:>8.2f}{processor:>11.2f}")
    print(f"{'share':<18}{rates[1, 0] / rates[0, 0]:>8.1%}{rates[1, 1] / rates[0, 1]:>11.1%}")


if __name__ == "__main__":
    main()
