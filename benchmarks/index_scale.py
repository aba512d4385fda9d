"""An index of a million made-up passages through the layer that holds real ones: seconds, bytes, memory.

    python -m benchmarks.index_scale FOLDER [--passages 1000000] [--queries 1000] [--width 1024]

Lexical ids follow Zipf's law over 250 002 ids, 60 draws a passage, 8 a query. Memory is what the process
allocated (RssAnon); mapped pages of the index belong to the page cache and are given back when others need
them.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from megam3.files import atomic_folder
from megam3.retrieval.index.layout import IndexSpec, PassageIndex, claim_index, shard_folder, write_shard
from megam3.retrieval.index.nearest import dense_hits
from megam3.retrieval.index.search import SearchOptions, find_candidates, lexical_hits
from megam3.retrieval.index.vectors import TextVectors, offsets_of

VOCABULARY, PER_SHARD, MULTI_WIDTH, MULTI_ROWS = 250_002, 16_384, 64, 16


def made_up(count: int, width: int, draws: int, rows: int, seed: int) -> TextVectors:
    """`count` texts."""
    rng = np.random.default_rng(seed)
    dense = rng.standard_normal((count, width), dtype=np.float32)
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    # 1/rank over the vocabulary, by the inverse of its distribution
    ids = np.exp(rng.random((count, draws)) * np.log(VOCABULARY)).astype(np.int64)
    keys = np.unique(np.arange(count)[:, None] * VOCABULARY + ids.clip(max=VOCABULARY - 1))
    multi = rng.standard_normal((count * rows, MULTI_WIDTH), dtype=np.float32)
    multi /= np.linalg.norm(multi, axis=1, keepdims=True)
    return TextVectors(
        dense_ND=dense,
        lexical_ids_Z=(keys % VOCABULARY).astype(np.int32),
        lexical_weights_Z=rng.uniform(0.05, 0.4, len(keys)).astype(np.float32),
        lexical_offsets_N1=offsets_of(np.bincount(keys // VOCABULARY, minlength=count)),
        multi_KC=multi,
        multi_offsets_N1=offsets_of(np.full(count, rows)),
    )


@contextmanager
def measured(what: str, queries: int = 0) -> Iterator[None]:
    """Print seconds, and the most memory allocated meanwhile."""
    peak, stop = [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.05):
            status = Path("/proc/self/status").read_text()
            anonymous = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            peak[0] = max(peak[0], int(anonymous.split()[1]))

    thread = threading.Thread(target=sample)
    thread.start()
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - started
        stop.set()
        thread.join()
    rate = f", {queries / seconds:.1f} queries/s" if queries else ""
    print(f"{what}: {seconds:.1f} s{rate}, {peak[0] / 1024:.0f} MiB allocated", flush=True)


def write_index(folder: Path, num_passages: int, width: int) -> PassageIndex:
    """Made-up shards; those that are there stay."""
    spec = IndexSpec(
        model="made up",
        passages="made up",
        num_passages=num_passages,
        passages_per_shard=PER_SHARD,
        max_tokens=64,
        multi_vector=True,
    )
    claim_index(folder, spec)
    for number in range(spec.num_shards):
        start, stop = spec.span(number)
        if not shard_folder(folder, number).is_dir():
            vectors = made_up(stop - start, width, 60, MULTI_ROWS, number)
            halved = TextVectors(**(vars(vectors) | {"dense_ND": vectors.dense_ND.astype(np.float16)}))
            with atomic_folder(shard_folder(folder, number)) as aside:
                write_shard(aside, halved)
    return PassageIndex(folder)


def check(index: PassageIndex, queries: TextVectors, count: int) -> None:
    """The first few queries against a plain pass over all passages, in float64."""
    dense, lexical = np.zeros((count, len(index))), np.zeros((count, len(index)))
    for number in range(index.spec.num_shards):
        shard = index.shard(number)
        place = slice(shard.first_row, shard.first_row + shard.vectors.num_texts)
        dense[:, place] = queries.dense_ND[:count].astype(float) @ shard.vectors.dense_ND.astype(float).T
        text_Z = np.repeat(np.arange(shard.vectors.num_texts), np.diff(shard.vectors.lexical_offsets_N1))
        for q in range(count):
            table = np.zeros(VOCABULARY)
            ids, weights = queries.lexical(q)
            table[ids] = weights
            products = table[shard.vectors.lexical_ids_Z] * shard.vectors.lexical_weights_Z
            lexical[q, place] = np.bincount(text_Z, products, minlength=shard.vectors.num_texts)
    few = queries.select(range(count))
    for name, hits, wanted in (
        ("dense", dense_hits(index, few.dense_ND, 210), dense),
        ("lexical", lexical_hits(index, few, 210), lexical),
    ):
        best = -np.sort(-wanted, axis=1)[:, :210]
        print(f"{name}: largest difference to a plain pass {np.abs(hits.scores_QK.numpy() - best).max():.1e}")


def main() -> None:
    """Write, search, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--width", type=int, default=1024)
    given = parser.parse_args()
    with measured("libraries alone"):
        time.sleep(0.2)
    with measured("writing the shards"):
        index = write_index(given.folder, given.passages, given.width)
    size = sum(path.stat().st_size for path in given.folder.rglob("*.npy"))
    print(f"{len(index):,} passages in {index.spec.num_shards} shards, {size / 2**30:.2f} GiB")
    queries = made_up(given.queries, given.width, 8, 8, 10**6)
    with measured("dense, exact by faiss, 210 hits", given.queries):
        dense_hits(index, queries.dense_ND, 210)
    with measured("lexical, exact, 210 hits", given.queries):
        lexical_hits(index, queries, 210)
    few = queries.select(range(given.queries // 10))
    with measured("multi-vector re-ranking of 210 (with its dense search)", few.num_texts):
        find_candidates(index, few, SearchOptions(by="multi_vector"))
    with measured("sum over both first 210 (with both searches)", few.num_texts):
        find_candidates(index, few, SearchOptions(by="sum"))
    check(index, queries, 5)


if __name__ == "__main__":
    main()
