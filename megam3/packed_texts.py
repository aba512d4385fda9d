"""Texts as one token stream, with their lexical pairs: what batches are made of. Shape suffixes are those of
`batch.py`.

Nothing is padded. Three texts of 3, 2 and 4 tokens are one stream of 9:

    input_ids_T     0 7 2 | 0 2 | 0 9 8 2
    position_ids_T  0 1 2 | 0 1 | 0 1 2 3         (the backbone adds its own offset, 2 for XLM-R)
    cu_seqlens_N1   0       3     5         9
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megam3.lexical_pairs import PairArrays, find_pairs


@dataclass(frozen=True, kw_only=True)
class LexicalPairs:
    """The distinct non-special ids of each text, and which token feeds which of them."""

    ids_Z: Tensor
    """int64, ascending within a text."""
    offsets_N1: Tensor
    """int64: pairs of text n are offsets_N1[n] … offsets_N1[n+1]-1."""
    pair_T: Tensor
    """int64: 1 + the pair of each token; 0 for special tokens, which feed none."""
    counts: tuple[int, ...]
    """Pairs of each text, on the host: nobody has to ask the device for a size."""

    def select(self, start: int, stop: int, tokens: slice) -> LexicalPairs:
        """Those of texts start..stop-1, whose tokens are `tokens`."""
        first, last = sum(self.counts[:start]), sum(self.counts[:stop])
        return LexicalPairs(
            ids_Z=self.ids_Z[first:last],
            offsets_N1=self.offsets_N1[start : stop + 1] - first,
            # special tokens, which feed no pair, are 0 before and fall below 0 here
            pair_T=(self.pair_T[tokens] - first).clamp(min=0),
            counts=self.counts[start:stop],
        )


def make_pairs(found: PairArrays) -> LexicalPairs:
    """What `find_pairs` found, as tensors on the CPU."""
    offsets = np.concatenate([[0], np.cumsum(found.counts)]).astype(np.int64)
    return LexicalPairs(
        ids_Z=torch.from_numpy(found.ids),
        offsets_N1=torch.from_numpy(offsets),
        pair_T=torch.from_numpy(found.pair_of_token),
        counts=tuple(found.counts.tolist()),
    )


def map_tensors(record: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same record with every tensor in it, and in the records in it, changed."""
    changed = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif is_dataclass(value):
            changed[field.name] = map_tensors(value, change)
    return replace(record, **changed)


def copy_to(device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """For `map_tensors`: onto `device`, overlapping with compute where the source is pinned."""
    return lambda tensor: tensor.to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class PackedTexts:
    """N texts as one token stream. Lengths also stay on the host: no kernel launch waits for a copy."""

    input_ids_T: Tensor
    """int64."""
    position_ids_T: Tensor
    """int64, from 0 in every text."""
    cu_seqlens_N1: Tensor
    """int32, on the device of the stream."""
    lengths: tuple[int, ...]
    """Tokens per text, on the host."""
    lexical: LexicalPairs | None = None
    """What the lexical head writes into; None: found when the model asks for it."""

    @property
    def num_texts(self) -> int:
        """N."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.input_ids_T.shape[0])

    @property
    def max_length(self) -> int:
        """Tokens of the longest text; 0 without texts."""
        return max(self.lengths, default=0)

    def to(self, device: torch.device | str) -> PackedTexts:
        """The same texts on `device`; copies overlap with compute when the source is pinned."""
        return map_tensors(self, copy_to(device))

    def with_pairs(self, special_ids: Sequence[int]) -> PackedTexts:
        """The same texts with their lexical pairs, which stand on the host before anything is queued there.

        Texts on a device are waited for; a loader's worker finds them before they get there.
        """
        if self.lexical is not None:
            return self
        pairs = make_pairs(find_pairs(self.input_ids_T.cpu().numpy(), self.lengths, special_ids))
        return replace(self, lexical=map_tensors(pairs, copy_to(self.input_ids_T.device)))

    def text_ids_T(self) -> Tensor:
        """Index of the text each token belongs to, int64."""
        lengths_N = (self.cu_seqlens_N1[1:] - self.cu_seqlens_N1[:-1]).long()
        index_N = torch.arange(self.num_texts, device=lengths_N.device)
        return torch.repeat_interleave(index_N, lengths_N, output_size=self.num_tokens)

    def select(self, start: int, stop: int) -> PackedTexts:
        """Texts start..stop-1 as a stream of their own (views, no copy of tokens)."""
        # sums on the host: an offset read from the device would wait for everything queued there
        first, last = sum(self.lengths[:start]), sum(self.lengths[:stop])
        return PackedTexts(
            input_ids_T=self.input_ids_T[first:last],
            position_ids_T=self.position_ids_T[first:last],
            cu_seqlens_N1=self.cu_seqlens_N1[start : stop + 1] - self.cu_seqlens_N1[start],
            lengths=self.lengths[start:stop],
            lexical=self.lexical and self.lexical.select(start, stop, slice(first, last)),
        )


def pack_texts(token_ids: Sequence[Sequence[int]]) -> PackedTexts:
    """Join token id lists (special tokens included) into one stream on the CPU.

    Raises:
        ValueError: a text without tokens; the encoder would have nothing to read there.
    """
    lengths = tuple(len(ids) for ids in token_ids)
    if 0 in lengths:
        raise ValueError(
            f"text {lengths.index(0)} has no tokens; every text needs at least its special tokens"
        )
    if not lengths:
        return pack_stream(torch.zeros(0, dtype=torch.int64), lengths)
    return pack_stream(torch.cat([torch.as_tensor(ids, dtype=torch.int64) for ids in token_ids]), lengths)


def pack_stream(input_ids_T: Tensor, lengths: Sequence[int]) -> PackedTexts:
    """Texts that already lie one after the other, int64 on the CPU; `lengths` add up to T."""
    lengths_N = torch.tensor(lengths, dtype=torch.int64)
    cu_seqlens_N1 = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu_seqlens_N1[1:] = lengths_N.cumsum(0)
    starts_T = torch.repeat_interleave(cu_seqlens_N1[:-1].long(), lengths_N)
    return PackedTexts(
        input_ids_T=input_ids_T,
        position_ids_T=torch.arange(input_ids_T.shape[0]) - starts_T,
        cu_seqlens_N1=cu_seqlens_N1,
        lengths=tuple(lengths),
    )


def pin_memory(record: Any) -> Any:
    """The same record (a batch, texts) in page-locked memory; needs a GPU's driver."""
    return map_tensors(record, lambda tensor: tensor.pin_memory())


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Positions of texts, longest first, in batches of at most `batch_tokens`; a longer one goes alone.

    >>> list(length_batches([2, 9, 3, 4], 7))
    [[1], [3, 2], [0]]
    """
    batch: list[int] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and used + lengths[index] > batch_tokens:
            yield batch
            batch, used = [], 0
        batch.append(index)
        used += lengths[index]
    if batch:
        yield batch
