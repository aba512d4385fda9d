"""The best passages of many queries by dense score: exact, shard by shard, or through an approximate index.

    faiss       exact: faiss's blocked inner product on the CPU, or on GPUs with a faiss built for them
    torch       exact: one matrix product a shard on any device of torch: a GPU needs no faiss for it
    ivf, hnsw   approximate: one faiss index over all shards (`build_approximate`), for a million and more

Exact search holds one shard in float32 at a time, whatever the corpus.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import torch

from megam3.errors import ConfigError
from megam3.retrieval.index.layout import PassageIndex
from megam3.retrieval.topk import Hits, empty_hits, merge_hits, top_k

DenseSearch = Literal["faiss", "torch", "ivf", "hnsw"]
DENSE_SEARCHES = ("faiss", "torch", "ivf", "hnsw")
_TRAINING_VECTORS_PER_LIST = 64
"""faiss warns below 39."""
_HNSW_NEIGHBOURS = 32
NUM_PROBES = 32
"""Lists that an ivf search visits; more are slower and miss less."""


def dense_hits(
    index: PassageIndex,
    queries_QD: np.ndarray,
    num_hits: int,
    how: DenseSearch = "faiss",
    device: torch.device | str = "cpu",
) -> Hits:
    """The best passages of each query by inner product, as many as there are up to `num_hits`.

    Raises:
        ConfigError: an unknown way to search, or an approximate one without its index.
    """
    if how not in DENSE_SEARCHES:
        raise ConfigError("dense_search", how, f"must be one of {', '.join(DENSE_SEARCHES)}", "use faiss")
    queries_QD = np.ascontiguousarray(queries_QD, dtype=np.float32)
    num_hits = min(num_hits, len(index))
    if how in ("ivf", "hnsw"):
        return _approximate_hits(index, queries_QD, num_hits, how)
    hits = empty_hits(len(queries_QD))
    for number in range(index.spec.num_shards):
        shard = index.shard(number)
        if how == "torch":
            found = _by_torch(queries_QD, shard.vectors.dense_ND, num_hits, device)
        else:
            found = _by_faiss(queries_QD, shard.vectors.dense_ND, num_hits)
        hits = merge_hits(hits, Hits(found.scores_QK, found.rows_QK + shard.first_row), num_hits)
    return hits


def _by_faiss(queries_QD: np.ndarray, passages_PD: np.ndarray, num_hits: int) -> Hits:
    passages_PD = np.asarray(passages_PD, dtype=np.float32)
    num_hits = min(num_hits, len(passages_PD))
    if hasattr(faiss, "knn_gpu") and faiss.get_num_gpus() > 0:
        resources = _gpu_resources()
        scores, rows = faiss.knn_gpu(
            resources, queries_QD, passages_PD, num_hits, metric=faiss.METRIC_INNER_PRODUCT
        )
    else:
        scores, rows = faiss.knn(queries_QD, passages_PD, num_hits, metric=faiss.METRIC_INNER_PRODUCT)
    return Hits(torch.from_numpy(scores), torch.from_numpy(rows))


def _gpu_resources() -> Any:
    # made once: it takes scratch memory on the device
    if not hasattr(_gpu_resources, "made"):
        _gpu_resources.made = faiss.StandardGpuResources()  # type: ignore[attr-defined]
    return _gpu_resources.made  # type: ignore[attr-defined]


def _by_torch(
    queries_QD: np.ndarray, passages_PD: np.ndarray, num_hits: int, device: torch.device | str
) -> Hits:
    queries = torch.from_numpy(queries_QD).to(device)
    passages = torch.from_numpy(np.array(passages_PD)).to(device).float()
    rows = torch.arange(passages.shape[0], device=device).expand(queries.shape[0], -1)
    hits = top_k(queries @ passages.T, rows, num_hits)
    return Hits(hits.scores_QK.cpu(), hits.rows_QK.cpu())


def approximate_file(index: PassageIndex, how: str) -> Path:
    """Where the approximate index lies."""
    return index.folder / f"dense.{how}"


def build_approximate(index: PassageIndex, how: Literal["ivf", "hnsw"], seed: int = 0) -> Path:
    """Make the approximate index of all shards, unless it is there: 4·sqrt(n) lists, or a graph.

    Its size in memory is that of the vectors in float16, plus 8 bytes (ivf) or 260 (hnsw) a passage; an ivf
    file is mapped, not read.
    """
    file = approximate_file(index, how)
    if file.exists():
        return file
    width = index.shard(0).vectors.dense_ND.shape[1]
    num_lists = max(1, min(int(4 * len(index) ** 0.5), len(index) // 39))
    kind = f"IVF{num_lists},SQfp16" if how == "ivf" else f"HNSW{_HNSW_NEIGHBOURS},SQfp16"
    built = faiss.index_factory(width, kind, faiss.METRIC_INNER_PRODUCT)
    built.train(_training_vectors(index, num_lists * _TRAINING_VECTORS_PER_LIST, seed))
    for number in range(index.spec.num_shards):
        built.add(np.asarray(index.shard(number).vectors.dense_ND, dtype=np.float32))
    aside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    faiss.write_index(built, str(aside))
    os.replace(aside, file)
    return file


def _training_vectors(index: PassageIndex, count: int, seed: int) -> np.ndarray:
    count = min(count, len(index))
    rows = np.sort(np.random.default_rng(seed).choice(len(index), count, replace=False))
    numbers = rows // index.spec.passages_per_shard
    parts = [
        index.shard(number).vectors.dense_ND[rows[numbers == number] - index.shard(number).first_row]
        for number in np.unique(numbers).tolist()
    ]
    return np.concatenate(parts).astype(np.float32)


def _approximate_hits(index: PassageIndex, queries_QD: np.ndarray, num_hits: int, how: str) -> Hits:
    file = approximate_file(index, how)
    if not file.exists():
        rule = f"needs {file}, which was not built"
        raise ConfigError("dense_search", how, rule, "build the index with it, or use faiss")
    built: Any = faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    if how == "ivf":
        built.nprobe = NUM_PROBES
    else:
        built.hnsw.efSearch = max(2 * num_hits, 64)
    scores, rows = built.search(queries_QD, num_hits)
    scores[rows < 0] = -np.inf
    return Hits(torch.from_numpy(scores), torch.from_numpy(rows))
