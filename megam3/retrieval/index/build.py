"""Encode a pool into an index: every rank takes every W-th shard, and a shard that is there is not made
again.

Memory is that of one shard: its texts and token ids, its dense vectors and lexical pairs; multi-vector rows
go through a mapped file. A process killed in between loses the shards it was at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megam3.dist import comm
from megam3.embedder import M3Embedder
from megam3.errors import ConfigError
from megam3.files import atomic_folder, file_digest
from megam3.retrieval.index.layout import IndexSpec, PassageIndex, claim_index, shard_folder, write_shard
from megam3.retrieval.index.pool import TextPool
from megam3.retrieval.index.vectors import encode_vectors

MAX_SHARD_PASSAGES = 16384
MAX_SHARD_TEXT_BYTES = 128 << 20
_FINGERPRINTED = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.model", "*_Dense/*")


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """How passages are encoded."""

    max_tokens: int = 512
    batch_tokens: int | None = None
    """Tokens encoded at a time; None: what suits the device."""
    instruction: str = ""
    dense_dtype: str = "float16"
    lexical: bool = True
    """Lexical weights too; dense candidates need none."""
    multi_vector: bool = False


def model_fingerprint(folder: str | Path) -> str:
    """Digest of the files of a model folder that decide on its output; reads the weights through once."""
    hasher = hashlib.blake2b(digest_size=16)
    names = {path for pattern in _FINGERPRINTED for path in Path(folder).glob(pattern)}
    for path in sorted(names):
        hasher.update(f"{path.relative_to(folder)} {file_digest(path)}\n".encode())
    return hasher.hexdigest()


def passages_per_shard(pool: TextPool) -> int:
    """As many as fit a shard's limits, by the pool's mean length."""
    mean_bytes = max(1, pool.num_bytes // len(pool))
    return max(1, min(MAX_SHARD_PASSAGES, MAX_SHARD_TEXT_BYTES // mean_bytes))


def build_index(
    embedder: M3Embedder,
    pool: TextPool,
    folder: str | Path,
    model: str,
    options: EncodeOptions,
    on_progress: Callable[[int, int], None] | None = None,
) -> PassageIndex:
    """Encode all passages; all ranks call it together and get the finished index.

    Args:
        model: the model's fingerprint (`model_fingerprint`).
        on_progress: called with (shards of this rank that are done, shards of this rank).

    Raises:
        ConfigError: an unknown dtype.
        DataError: the folder holds an index of something else.
        CheckpointError: representations are not finite.
    """
    if options.dense_dtype not in ("float16", "float32"):
        raise ConfigError("dense_dtype", options.dense_dtype, "must be float16 or float32", "use float16")
    folder = Path(folder)
    spec = IndexSpec(
        model=model,
        passages=pool.fingerprint,
        num_passages=len(pool),
        passages_per_shard=passages_per_shard(pool),
        max_tokens=min(options.max_tokens, embedder.max_tokens),
        instruction=options.instruction,
        dense_dtype=options.dense_dtype,
        lexical=options.lexical,
        multi_vector=options.multi_vector,
    )
    if comm.is_main():
        claim_index(folder, spec)
    comm.barrier()
    own = range(comm.rank(), spec.num_shards, comm.world_size())
    for done, number in enumerate(own, 1):
        if not shard_folder(folder, number).is_dir():
            _encode_shard(embedder, pool, spec, shard_folder(folder, number), number, options.batch_tokens)
        if on_progress is not None:
            on_progress(done, len(own))
    comm.barrier()
    return PassageIndex(folder)


def _encode_shard(
    embedder: M3Embedder,
    pool: TextPool,
    spec: IndexSpec,
    folder: Path,
    number: int,
    batch_tokens: int | None,
) -> None:
    texts = [spec.instruction + text for text in pool.texts(*spec.span(number))]
    with atomic_folder(folder) as aside:

        def mapped(shape: tuple[int, int]) -> np.ndarray:
            return np.lib.format.open_memmap(aside / "multi.npy", mode="w+", dtype=np.float16, shape=shape)

        vectors = encode_vectors(
            embedder,
            texts,
            max_tokens=spec.max_tokens,
            batch_tokens=batch_tokens,
            dense_dtype=np.float16 if spec.dense_dtype == "float16" else np.float32,
            lexical=spec.lexical,
            new_multi=mapped if spec.multi_vector else None,
        )
        if isinstance(vectors.multi_KC, np.memmap):
            vectors.multi_KC.flush()
        write_shard(aside, vectors)
