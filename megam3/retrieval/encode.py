"""Encode many texts once: dense vectors and lexical pairs are kept, multi-vector rows only while they fit.

Multi-vector rows are large: 100 000 passages of 350 tokens at C = 1024 take 70 GB in fp16. Below the limit
they are kept in fp16; above it `multi_rows` encodes the passages that are asked for a second time, and
nothing is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megam3.batch import Representations
from megam3.dist import comm
from megam3.errors import CheckpointError
from megam3.packed_texts import length_batches

EncodeIds = Callable[[Sequence[Sequence[int]]], Representations]
"""Token id lists of one batch (special tokens included) to their representations, without a graph."""
MULTI_VECTOR_BYTES = 4 << 30
"""Multi-vector rows of a rank's passages are kept in memory up to this size."""


@dataclass(frozen=True, kw_only=True)
class EncodedTexts:
    """N texts on the host, in the order given."""

    dense_ND: Tensor
    """float32."""
    lexical_weights_Z: Tensor
    lexical_ids_Z: Tensor
    lexical_offsets_N1: Tensor
    multi_rows: list[Tensor] | None
    """Rows of each text, [tokens - 1, C]; None: too large to keep."""

    @property
    def num_texts(self) -> int:
        """N."""
        return int(self.dense_ND.shape[0])


def encode_batches(
    encode_ids: EncodeIds, token_ids: Sequence[Sequence[int]], batch_tokens: int
) -> Iterator[tuple[list[int], Representations]]:
    """Batches of (positions in `token_ids`, representations), longest first.

    With several ranks every rank encodes equally many batches, the shorter ones some of their text twice:
    under ZeRO-3 a forward pass is a collective call that all ranks must enter.
    """
    batches = list(length_batches([len(ids) for ids in token_ids], batch_tokens))
    with torch.no_grad():
        for batch in batches:
            yield batch, encode_ids([token_ids[i] for i in batch])
        filler = token_ids[0] if token_ids else [0]
        for _ in range(comm.max_over_ranks(len(batches)) - len(batches)):
            encode_ids([filler])


def _split(values: Tensor, offsets_N1: Tensor) -> list[Tensor]:
    return list(values.split((offsets_N1[1:] - offsets_N1[:-1]).tolist()))


def encode_texts(
    encode_ids: EncodeIds,
    token_ids: Sequence[Sequence[int]],
    batch_tokens: int,
    multi_dtype: torch.dtype = torch.float16,
    multi_bytes: int = MULTI_VECTOR_BYTES,
) -> EncodedTexts:
    """Encode all texts; keep multi-vector rows in `multi_dtype` when every rank's fit in `multi_bytes` (0:
    never).

    Raises:
        CheckpointError: a representation is not finite; the weights are broken.
    """
    num_texts, num_rows = len(token_ids), sum(len(ids) - 1 for ids in token_ids)
    nothing = torch.zeros(0)
    dense: list[Tensor] = [nothing] * num_texts
    weights: list[Tensor] = [nothing] * num_texts
    ids: list[Tensor] = [nothing] * num_texts
    rows: list[Tensor] | None = [nothing] * num_texts
    for batch, encoded in encode_batches(encode_ids, token_ids, batch_tokens):
        if not all(bool(values.isfinite().all()) for values in encoded.floats()):
            raise CheckpointError(
                "model",
                "its weights",
                "give representations that are not finite",
                "evaluate an earlier checkpoint",
            )
        if rows is not None and num_rows * encoded.multi_KC.shape[1] * multi_dtype.itemsize > multi_bytes:
            rows = None
        parts = [
            (dense, list(encoded.dense_ND.float().cpu())),
            (weights, _split(encoded.lexical_weights_Z.float().cpu(), encoded.lexical_offsets_N1)),
            (ids, _split(encoded.lexical_ids_Z.cpu(), encoded.lexical_offsets_N1)),
        ]
        if rows is not None:
            parts.append((rows, _split(encoded.multi_KC.to(multi_dtype).cpu(), encoded.multi_offsets_N1)))
        for target, values in parts:
            for position, value in zip(batch, values):
                target[position] = value
    if comm.any_rank(rows is None):  # all keep or none: encoding again is a collective call
        rows = None
    counts = torch.tensor([0, *[len(part) for part in ids]], dtype=torch.int64)
    empty = not num_texts
    return EncodedTexts(
        dense_ND=torch.zeros(0, 0) if empty else torch.stack(dense),
        lexical_weights_Z=nothing if empty else torch.cat(weights),
        lexical_ids_Z=torch.zeros(0, dtype=torch.int64) if empty else torch.cat(ids),
        lexical_offsets_N1=counts.cumsum(0),
        multi_rows=rows,
    )


def multi_vector_rows(
    passages: EncodedTexts,
    wanted: Sequence[int],
    encode_ids: EncodeIds,
    token_ids: Sequence[Sequence[int]],
    batch_tokens: int,
) -> Iterator[tuple[int, Tensor]]:
    """(passage, its rows in fp32) for the `wanted` passages, in any order: from memory, or encoded again when
    they were not kept."""
    if passages.multi_rows is not None:
        for passage in wanted:
            yield passage, passages.multi_rows[passage].float()
        return
    for batch, encoded in encode_batches(
        encode_ids, [token_ids[passage] for passage in wanted], batch_tokens
    ):
        for position, rows in zip(batch, _split(encoded.multi_KC.float().cpu(), encoded.multi_offsets_N1)):
            yield wanted[position], rows
