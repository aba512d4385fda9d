"""From a worker's plain arrays to the batch contracts of megam3.batch.

draft of 2 queries with groups of 2 and 1:   texts  q0 q1 | p00 p01 | p10       group_offsets  0 2 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from megam3.batch import PackedTexts, RetrievalBatch


@dataclass(frozen=True)
class TextBatch:
    """One rank's share of one step of pretraining: N sequences, each of one document or of several packed ones."""

    texts: PackedTexts
    document_offsets_N1: Tensor
    """int64, on the CPU: documents of sequence n are document_offsets_N1[n] … document_offsets_N1[n+1]-1 of `rows`."""
    rows: Tensor
    """int64: row of each document."""
    dataset: str = ""
    language: str = ""
    num_truncated: int = 0

    @property
    def num_samples(self) -> int:
        """Documents on this rank."""
        return int(self.rows.shape[0])

    @property
    def padded_tokens(self) -> int:
        """Tokens a padded pipeline would process."""
        return self.texts.num_texts * self.texts.max_length

    def to(self, device: torch.device | str) -> TextBatch:
        """The texts on `device`."""
        return replace(self, texts=self.texts.to(device))


def frame_to_batch(
    labels: dict, arrays: Sequence[np.ndarray], pin: bool = False
) -> RetrievalBatch | TextBatch:
    """The batch; with `pin` its texts lie in page-locked memory, so that copies to a GPU overlap with compute."""
    tokens, lengths, offsets, rows, hashes, scores = arrays
    texts = _packed(tokens, lengths)
    if pin:
        streams = {
            name: getattr(texts, name).pin_memory()
            for name in ("input_ids_T", "position_ids_T", "cu_seqlens_N1")
        }
        texts = replace(texts, **streams)
    shared = {name: labels[name] for name in ("dataset", "language", "num_truncated")}
    if labels["kind"] == "text":
        return TextBatch(texts, torch.from_numpy(offsets), torch.from_numpy(rows), **shared)
    return RetrievalBatch(
        texts,
        torch.from_numpy(offsets),
        torch.from_numpy(rows),
        torch.from_numpy(hashes),
        torch.from_numpy(scores) if len(scores) else None,
        labels["in_batch_negatives"],
        **shared,
    )


def _packed(tokens: np.ndarray, lengths: np.ndarray) -> PackedTexts:
    ends = np.cumsum([0, *lengths.tolist()], dtype=np.int64)
    positions = np.arange(len(tokens)) - np.repeat(ends[:-1], lengths)
    return PackedTexts(
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy(positions),
        torch.from_numpy(ends.astype(np.int32)),
        tuple(lengths.tolist()),
    )
