"""The contracts between data, model and objectives, and the legend of shape suffixes.

    T tokens in a stream      N texts in a stream       Q queries
    P passages (all groups, the positive first in each)
    G passages per query      D hidden width            C multi-vector width V vocabulary        W ranks
    K multi-vector rows       Z (text, id) pairs with an id that occurs in the text, ascending by text then id
    a trailing 1 is one more: `cu_seqlens_N1` has N + 1 entries

Nothing is padded. Three texts of 3, 2 and 4 tokens are one stream of 9:

    input_ids_T     0 7 2 | 0 2 | 0 9 8 2
    position_ids_T  0 1 2 | 0 1 | 0 1 2 3         (the backbone adds its own offset, 2 for XLM-R)
    cu_seqlens_N1   0       3     5         9
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import Self  # Python 3.11, and only a type


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
        return replace(
            self,
            input_ids_T=self.input_ids_T.to(device, non_blocking=True),
            position_ids_T=self.position_ids_T.to(device, non_blocking=True),
            cu_seqlens_N1=self.cu_seqlens_N1.to(device, non_blocking=True),
        )

    def pin_memory(self) -> PackedTexts:
        """The same texts in page-locked memory; needs a GPU's driver."""
        return replace(
            self,
            input_ids_T=self.input_ids_T.pin_memory(),
            position_ids_T=self.position_ids_T.pin_memory(),
            cu_seqlens_N1=self.cu_seqlens_N1.pin_memory(),
        )

    def text_ids_T(self) -> Tensor:
        """Index of the text each token belongs to, int64."""
        lengths_N = (self.cu_seqlens_N1[1:] - self.cu_seqlens_N1[:-1]).long()
        index_N = torch.arange(self.num_texts, device=lengths_N.device)
        return torch.repeat_interleave(index_N, lengths_N, output_size=self.num_tokens)

    def select(self, start: int, stop: int) -> PackedTexts:
        """Texts start..stop-1 as a stream of their own (views, no copy of tokens)."""
        first, last = sum(self.lengths[:start]), sum(self.lengths[:stop])
        return PackedTexts(
            input_ids_T=self.input_ids_T[first:last],
            position_ids_T=self.position_ids_T[first:last],
            cu_seqlens_N1=self.cu_seqlens_N1[start : stop + 1] - self.cu_seqlens_N1[start],
            lengths=self.lengths[start:stop],
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


@runtime_checkable
class Batch(Protocol):
    """What the loop, the log and the loader know of a batch: one rank's share of one step, of any stage."""

    @property
    def texts(self) -> PackedTexts:
        """All that is encoded."""

    @property
    def rows(self) -> Tensor:
        """int64, on the CPU: row of each sample among the rows of all datasets."""

    @property
    def dataset(self) -> str:
        """Name of the dataset; `mixed` when small datasets share a batch."""

    @property
    def language(self) -> str:
        """Language code; `mul` for several."""

    @property
    def num_samples(self) -> int:
        """What progress counts, on this rank."""

    @property
    def num_truncated(self) -> int:
        """Texts of this batch cut at their limit."""

    @property
    def padded_tokens(self) -> int:
        """Tokens a padded pipeline would process."""

    def to(self, device: torch.device | str) -> Self:
        """The texts on `device`; the rest stays on the host, where the plan and the log read it."""


@dataclass(frozen=True, kw_only=True)
class RetrievalBatch:
    """One rank's share of one step: Q queries and their groups of passages, the positive first in each group.

    `texts` holds the Q queries, then the P passages by group: query i owns the passages group_offsets_Q1[i]
    to group_offsets_Q1[i+1] - 1. Two queries with groups of 2 and 1:

        texts  q0 q1 | p00 p01 | p10       group_offsets_Q1  0 2 3
    """

    texts: PackedTexts
    group_offsets_Q1: Tensor
    """int64, on the CPU; group sizes may differ."""
    rows_Q: Tensor
    """int64: row of each query among all datasets; names the sample in logs and resume tests."""
    passage_hashes_P: Tensor
    """int64: hash of the passage's text; equal text anywhere in the global batch is no negative."""
    known_positive_hashes_QM: Tensor | None = None
    """int64: hashes of all positives of the query's record, also those not drawn; shorter rows repeat one.
    None: no record has more than the one drawn."""
    teacher_scores_P: Tensor | None = None
    """float32: scores of a teacher (a re-ranker), when the records carry them."""
    in_batch_negatives: bool = True
    """False restricts every softmax to the query's own group."""
    dataset: str = ""
    language: str = ""
    num_truncated: int = 0
    """Texts of this batch cut at their limit."""

    @property
    def rows(self) -> Tensor:
        """rows_Q: a sample is a query."""
        return self.rows_Q

    @property
    def num_queries(self) -> int:
        """Q on this rank."""
        return int(self.rows_Q.shape[0])

    @property
    def num_samples(self) -> int:
        """What progress counts: queries, here."""
        return self.num_queries

    @property
    def num_passages(self) -> int:
        """P on this rank."""
        return int(self.passage_hashes_P.shape[0])

    @property
    def padded_tokens(self) -> int:
        """Tokens a padded pipeline would process: queries and passages each padded to their longest."""
        queries, passages = self.texts.lengths[: self.num_queries], self.texts.lengths[self.num_queries :]
        return len(queries) * max(queries, default=0) + len(passages) * max(passages, default=0)

    def to(self, device: torch.device | str) -> RetrievalBatch:
        """The texts on `device`; bookkeeping stays on the host, where the plan and the log read it."""
        return replace(self, texts=self.texts.to(device))


@dataclass(frozen=True, kw_only=True)
class TextBatch:
    """One rank's share of one step of pretraining: N sequences, each one document or several packed ones."""

    texts: PackedTexts
    document_offsets_N1: Tensor
    """int64, on the CPU: start of each sequence's documents in `rows`, and their end."""
    rows: Tensor
    """int64: row of each document among all datasets."""
    dataset: str = ""
    language: str = ""
    num_truncated: int = 0
    """Documents of this batch cut at their limit."""

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


@dataclass(frozen=True, kw_only=True)
class Representations:
    """What the heads read from one forward pass over N texts. Float tensors carry the graph."""

    dense_ND: Tensor
    """L2-normalised."""
    lexical_weights_Z: Tensor
    """Non-negative weight of each distinct non-special id of each text."""
    lexical_ids_Z: Tensor
    """int64, ascending within a text."""
    lexical_offsets_N1: Tensor
    """int64, on the device: pairs of text n are lexical_offsets_N1[n] … lexical_offsets_N1[n+1]-1."""
    multi_KC: Tensor
    """L2-normalised rows of every token but `<s>`."""
    multi_offsets_N1: Tensor
    """int64, on the device: rows of text n."""

    @property
    def num_texts(self) -> int:
        """N."""
        return int(self.dense_ND.shape[0])

    def select(self, start: int, stop: int) -> Representations:
        """Texts start..stop-1 (views, gradients flow)."""
        lexical, multi = self.lexical_offsets_N1[start : stop + 1], self.multi_offsets_N1[start : stop + 1]
        z0, z1, k0, k1 = torch.stack([lexical[0], lexical[-1], multi[0], multi[-1]]).tolist()
        return Representations(
            dense_ND=self.dense_ND[start:stop],
            lexical_weights_Z=self.lexical_weights_Z[z0:z1],
            lexical_ids_Z=self.lexical_ids_Z[z0:z1],
            lexical_offsets_N1=lexical - z0,
            multi_KC=self.multi_KC[k0:k1],
            multi_offsets_N1=multi - k0,
        )

    def split(self, sizes: Sequence[int]) -> list[Representations]:
        """Consecutive runs of `sizes` texts, which add up to all of them; gradients of all runs come back in
        one tensor.

        One look at the offsets serves all runs. `select` per run would, in the backward pass, make a tensor
        of the whole size for every run.
        """
        edges = [0]
        for size in sizes:
            edges.append(edges[-1] + size)
        assert edges[-1] == self.num_texts, "the runs must cover all texts"
        lexical, multi = self.lexical_offsets_N1, self.multi_offsets_N1
        first_pair, first_row = torch.stack([lexical[edges], multi[edges]]).tolist()
        pair_counts = [stop - start for start, stop in zip(first_pair, first_pair[1:])]
        row_counts = [stop - start for start, stop in zip(first_row, first_row[1:])]
        dense = self.dense_ND.split(list(sizes))
        weights = self.lexical_weights_Z.split(pair_counts)
        ids = self.lexical_ids_Z.split(pair_counts)
        vectors = self.multi_KC.split(row_counts)
        return [
            Representations(
                dense_ND=dense[run],
                lexical_weights_Z=weights[run],
                lexical_ids_Z=ids[run],
                lexical_offsets_N1=lexical[edges[run] : edges[run + 1] + 1] - first_pair[run],
                multi_KC=vectors[run],
                multi_offsets_N1=multi[edges[run] : edges[run + 1] + 1] - first_row[run],
            )
            for run in range(len(sizes))
        ]

    def keep_heads(self, heads: Collection[str]) -> Representations:
        """The same texts with no pairs or rows where that head is not named: nothing of it is moved or
        scored."""
        kept = self
        none_N1 = self.lexical_offsets_N1.new_zeros(self.num_texts + 1)
        if "lexical" not in heads:
            kept = replace(
                kept,
                lexical_weights_Z=kept.lexical_weights_Z[:0],
                lexical_ids_Z=kept.lexical_ids_Z[:0],
                lexical_offsets_N1=none_N1,
            )
        if "multi_vector" not in heads:
            kept = replace(kept, multi_KC=kept.multi_KC[:0], multi_offsets_N1=none_N1)
        return kept

    def floats(self) -> tuple[Tensor, Tensor, Tensor]:
        """The differentiable tensors: dense_ND, lexical_weights_Z, multi_KC."""
        return self.dense_ND, self.lexical_weights_Z, self.multi_KC

    def with_floats(self, dense_ND: Tensor, lexical_weights_Z: Tensor, multi_KC: Tensor) -> Representations:
        """The same structure around other float tensors (leaves of the gradient cache, for instance)."""
        return replace(self, dense_ND=dense_ND, lexical_weights_Z=lexical_weights_Z, multi_KC=multi_KC)


def join_representations(parts: Sequence[Representations]) -> Representations:
    """Concatenate along texts, in order; the inverse of splitting a batch into chunks."""

    def join_offsets(offsets: list[Tensor]) -> Tensor:
        counts = torch.cat([x[1:] - x[:-1] for x in offsets])
        return torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    return Representations(
        dense_ND=torch.cat([p.dense_ND for p in parts]),
        lexical_weights_Z=torch.cat([p.lexical_weights_Z for p in parts]),
        lexical_ids_Z=torch.cat([p.lexical_ids_Z for p in parts]),
        lexical_offsets_N1=join_offsets([p.lexical_offsets_N1 for p in parts]),
        multi_KC=torch.cat([p.multi_KC for p in parts]),
        multi_offsets_N1=join_offsets([p.multi_offsets_N1 for p in parts]),
    )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands; checkpointed, and handed to objectives, which keep no state of their own."""

    step: int = 0
    """Optimizer steps taken."""
    epoch: int = 0
    samples: int = 0
    """Queries (or documents, in pretraining) seen, over all ranks."""
    tokens: int = 0
    """Tokens encoded, over all ranks."""
