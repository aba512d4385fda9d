"""N encoded texts as flat arrays on the host: what a shard keeps on disk and a block of queries in memory.

The same three arrays-with-offsets as `Representations`, in numpy, so that they can be memory-mapped:

    dense_ND | lexical_ids_Z, lexical_weights_Z, lexical_offsets_N1 | multi_KC, multi_offsets_N1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megam3.embedder import M3Embedder
from megam3.errors import CheckpointError

NewArray = Callable[[tuple[int, int]], np.ndarray]
"""Makes the array for multi-vector rows, of the shape given: in memory, or mapped to a file."""


@dataclass(frozen=True, kw_only=True)
class TextVectors:
    """Representations of N texts. Lexical ids ascend within a text; weights of zero are left out."""

    dense_ND: np.ndarray
    lexical_ids_Z: np.ndarray
    lexical_weights_Z: np.ndarray
    lexical_offsets_N1: np.ndarray
    multi_KC: np.ndarray | None = None
    multi_offsets_N1: np.ndarray | None = None

    @property
    def num_texts(self) -> int:
        """N."""
        return len(self.lexical_offsets_N1) - 1

    def lexical(self, text: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, weights) of one text."""
        pairs = slice(int(self.lexical_offsets_N1[text]), int(self.lexical_offsets_N1[text + 1]))
        return self.lexical_ids_Z[pairs], self.lexical_weights_Z[pairs]

    def multi(self, text: int) -> np.ndarray:
        """Multi-vector rows of one text."""
        assert self.multi_KC is not None, "encoded without multi-vector rows"
        assert self.multi_offsets_N1 is not None
        return self.multi_KC[int(self.multi_offsets_N1[text]) : int(self.multi_offsets_N1[text + 1])]

    def select(self, texts: Sequence[int]) -> TextVectors:
        """Some texts, copied."""
        lexical = [self.lexical(text) for text in texts]
        rows = None if self.multi_KC is None else [self.multi(text) for text in texts]
        none = self.lexical_ids_Z[:0], self.lexical_weights_Z[:0]
        return TextVectors(
            dense_ND=self.dense_ND[list(texts)],
            lexical_ids_Z=np.concatenate([none[0], *(ids for ids, _ in lexical)]),
            lexical_weights_Z=np.concatenate([none[1], *(weights for _, weights in lexical)]),
            lexical_offsets_N1=offsets_of([len(ids) for ids, _ in lexical]),
            multi_KC=None
            if rows is None or self.multi_KC is None
            else np.concatenate([self.multi_KC[:0], *rows]),
            multi_offsets_N1=None if rows is None else offsets_of([len(part) for part in rows]),
        )


def join_vectors(parts: Sequence[TextVectors]) -> TextVectors:
    """One after another; all parts have multi-vector rows, or none."""
    with_rows = all(part.multi_KC is not None for part in parts)
    return TextVectors(
        dense_ND=np.concatenate([part.dense_ND for part in parts]),
        lexical_ids_Z=np.concatenate([part.lexical_ids_Z for part in parts]),
        lexical_weights_Z=np.concatenate([part.lexical_weights_Z for part in parts]),
        lexical_offsets_N1=_joined_offsets([part.lexical_offsets_N1 for part in parts]),
        multi_KC=np.concatenate([part.multi_KC for part in parts]) if with_rows else None,
        multi_offsets_N1=_joined_offsets([part.multi_offsets_N1 for part in parts]) if with_rows else None,  # type: ignore[misc]
    )


def _joined_offsets(offsets: Sequence[np.ndarray]) -> np.ndarray:
    return offsets_of(np.concatenate([np.diff(each) for each in offsets]))


def offsets_of(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """int64 [n + 1]: where each of n runs begins, and their end."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)


def encode_vectors(
    embedder: M3Embedder,
    texts: Sequence[str],
    *,
    max_tokens: int,
    batch_tokens: int | None = None,
    dense_dtype: type[np.floating] = np.float32,
    lexical: bool = True,
    new_multi: NewArray | None = None,
) -> TextVectors:
    """Encode texts in batches of like lengths; multi-vector rows go into the array that `new_multi` makes.

    Args:
        batch_tokens: encoded at a time; None: what suits the device.
        lexical: compute lexical weights; False: no text has any.
        new_multi: None: no multi-vector rows are computed.

    Raises:
        CheckpointError: a representation is not finite; the weights are broken.
    """
    token_ids = embedder.token_arrays(texts, max_tokens=max_tokens)
    dense_ND = np.zeros((len(texts), embedder.model.encoder.config.hidden_size), dtype=dense_dtype)
    first = 0 if embedder.model.first_id is None else 1
    multi_offsets = offsets_of([len(ids) - first for ids in token_ids])
    width = 0 if embedder.model.multi_vector_head is None else embedder.model.multi_vector_head.out_features
    multi_KC = None if new_multi is None else new_multi((int(multi_offsets[-1]), width))
    owners, ids, weights = [np.zeros(0, np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    heads = ["dense", *(["lexical"] if lexical else []), *([] if new_multi is None else ["multi_vector"])]
    for batch, encoded in embedder.represent_ids(token_ids, batch_tokens=batch_tokens, heads=heads):
        if not all(bool(values.isfinite().all()) for values in encoded.floats()):
            rule = "give representations that are not finite"
            raise CheckpointError("model", "its weights", rule, "use an earlier checkpoint")
        dense_ND[batch] = encoded.dense_ND.float().cpu().numpy()
        kept = (encoded.lexical_weights_Z > 0).cpu().numpy()
        counts = np.diff(encoded.lexical_offsets_N1.cpu().numpy())
        owners.append(np.repeat(np.asarray(batch, dtype=np.int64), counts)[kept])
        ids.append(encoded.lexical_ids_Z.cpu().numpy().astype(np.int32)[kept])
        weights.append(encoded.lexical_weights_Z.float().cpu().numpy()[kept])
        if multi_KC is not None:
            rows, offsets = encoded.multi_KC.float().cpu().numpy(), encoded.multi_offsets_N1.tolist()
            for text, start, stop in zip(batch, offsets, offsets[1:]):
                multi_KC[multi_offsets[text] : multi_offsets[text + 1]] = rows[start:stop]
    owner_Z = np.concatenate(owners)
    order = np.argsort(owner_Z, kind="stable")  # batches come by length; ids of a text stay in order
    return TextVectors(
        dense_ND=dense_ND,
        lexical_ids_Z=np.concatenate(ids)[order],
        lexical_weights_Z=np.concatenate(weights)[order],
        lexical_offsets_N1=offsets_of(np.bincount(owner_Z, minlength=len(texts))),
        multi_KC=multi_KC,
        multi_offsets_N1=None if multi_KC is None else multi_offsets,
    )
