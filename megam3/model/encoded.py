"""What M3Embedder.encode gives back, and how it is read out of a batch of Representations."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from megam3.batch import Representations


@dataclass(frozen=True)
class Encoded:
    """Representations in the form FlagEmbedding's users know, also by key: `encoded["dense_vecs"]`.

    For n texts each field holds n entries; for one, given as a string, its entry. Heads not asked for: None.
    """

    dense_vecs: Any
    """float32 [n, D], L2-normalised; numpy, or torch on the CPU."""
    lexical_weights: Any
    """Per text {token id as a string: weight}, weights above zero only."""
    colbert_vecs: Any
    """Per text float32 [tokens - 1, C], rows L2-normalised, `<s>` left out; numpy, or torch on the CPU."""

    def __getitem__(self, name: str) -> Any:
        if name not in ("dense_vecs", "lexical_weights", "colbert_vecs"):
            raise KeyError(f"{name!r}; there are dense_vecs, lexical_weights and colbert_vecs")
        return getattr(self, name)

    def first(self) -> Encoded:
        """Its first text alone."""
        fields = (self.dense_vecs, self.lexical_weights, self.colbert_vecs)
        return Encoded(*(None if values is None else values[0] for values in fields))


def lexical_dicts(representations: Representations) -> list[dict[str, float]]:
    """Per text {token id as a string: weight}, weights above zero only."""
    ids = representations.lexical_ids_Z.tolist()
    weights = representations.lexical_weights_Z.float().tolist()
    offsets = representations.lexical_offsets_N1.tolist()
    return [
        {str(ids[z]): weights[z] for z in range(start, stop) if weights[z] > 0}
        for start, stop in zip(offsets, offsets[1:])
    ]


def multi_vector_arrays(representations: Representations) -> list[np.ndarray]:
    """Per text its multi-vector rows, float32 [tokens - 1, C]."""
    rows, offsets = representations.multi_KC.float().cpu().numpy(), representations.multi_offsets_N1.tolist()
    return [rows[start:stop].copy() for start, stop in zip(offsets, offsets[1:])]


def encoded_batch(representations: Representations, heads: Collection[str]) -> Encoded:
    """What is asked for of one batch, on the host."""
    dense_ND = representations.dense_ND
    return Encoded(
        dense_ND.float().cpu().numpy() if "dense" in heads else None,
        lexical_dicts(representations) if "lexical" in heads else None,
        multi_vector_arrays(representations) if "multi_vector" in heads else None,
    )


def lexical_match(query: dict[str, float], passage: dict[str, float]) -> float:
    """Sum over shared ids of the product of their weights."""
    return sum(weight * passage[token] for token, weight in query.items() if token in passage)


def truncate_dense(dense_ND: np.ndarray, dim: int | None, normalize: bool) -> np.ndarray:
    """The first `dim` columns (Matryoshka, arXiv 2205.13147), each row of length 1 again if `normalize`."""
    if dim is None or dim == dense_ND.shape[1]:
        return dense_ND
    cut = dense_ND[:, :dim]
    if not normalize:
        return cut.copy()
    return cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)
