"""Indexes of made-up vectors: several shards, written by the layer that writes real ones."""

from pathlib import Path

import numpy as np

from megam3.files import atomic_folder
from megam3.retrieval.index.layout import IndexSpec, PassageIndex, claim_index, shard_folder, write_shard
from megam3.retrieval.index.vectors import TextVectors, offsets_of

WIDTH, MULTI_WIDTH, VOCAB = 8, 6, 50


def make_vectors(num_texts: int, seed: int, *, multi: bool = True, max_pairs: int = 12) -> TextVectors:
    """Random texts; the first has no lexical pair."""
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(num_texts, WIDTH)).astype(np.float32)
    dense /= np.linalg.norm(dense, axis=1, keepdims=True)
    counts = rng.integers(1, max_pairs, size=num_texts)
    counts[:1] = 0
    ids = [np.sort(rng.choice(VOCAB, count, replace=False)) for count in counts]
    rows = rng.integers(1, 7, size=num_texts)
    vectors = rng.normal(size=(rows.sum(), MULTI_WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return TextVectors(
        dense_ND=dense,
        lexical_ids_Z=np.concatenate(ids).astype(np.int32),
        lexical_weights_Z=rng.uniform(0.1, 1, size=counts.sum()).astype(np.float32),
        lexical_offsets_N1=offsets_of(counts),
        multi_KC=vectors if multi else None,
        multi_offsets_N1=offsets_of(rows) if multi else None,
    )


def make_index(folder: Path, passages: TextVectors, per_shard: int, dtype: str = "float32") -> PassageIndex:
    """An index of these passages."""
    spec = IndexSpec(
        model="m",
        passages="p",
        num_passages=passages.num_texts,
        passages_per_shard=per_shard,
        max_tokens=16,
        dense_dtype=dtype,
        multi_vector=passages.multi_KC is not None,
    )
    claim_index(folder, spec)
    for number in range(spec.num_shards):
        part = passages.select(range(*spec.span(number)))
        with atomic_folder(shard_folder(folder, number)) as aside:
            write_shard(aside, part)
    return PassageIndex(folder)


def naive_scores(queries: TextVectors, passages: TextVectors) -> dict[str, np.ndarray]:
    """All three score matrices, one pair at a time, from what an index stores: lexical and multi-vector in
    float16."""
    shape = queries.num_texts, passages.num_texts
    scores = {head: np.zeros(shape) for head in ("dense", "lexical", "multi_vector")}
    for q in range(shape[0]):
        query = dict(zip(*(values.tolist() for values in queries.lexical(q))))
        for p in range(shape[1]):
            ids, weights = passages.lexical(p)
            passage = dict(zip(ids.tolist(), weights.astype(np.float16).tolist()))
            scores["dense"][q, p] = float(
                queries.dense_ND[q].astype(float) @ passages.dense_ND[p].astype(float)
            )
            scores["lexical"][q, p] = sum(weight * passage[i] for i, weight in query.items() if i in passage)
            if queries.multi_KC is not None:
                rows = passages.multi(p).astype(np.float16).astype(float)
                best = [max(float(a.astype(float) @ b) for b in rows) for a in queries.multi(q)]
                scores["multi_vector"][q, p] = sum(best) / len(best)
    return scores
