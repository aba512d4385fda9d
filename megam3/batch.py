"""The contracts between data, model and objectives, and the legend of shape suffixes.

    T tokens in a stream      N texts in a stream       Q queries
    P passages (all groups, the positive first in each)
    G passages per query      D hidden width            C multi-vector width V vocabulary        W ranks
    K multi-vector rows       Z (text, id) pairs with an id that occurs in the text, ascending by text then id
    a trailing 1 is one more: `cu_seqlens_N1` has N + 1 entries

How texts lie in a stream: `packed_texts.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from megam3.packed_texts import PackedTexts, copy_to, map_tensors

_Batch = TypeVar("_Batch")
"""typing.Self came with Python 3.11."""


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

    def to(self: _Batch, device: torch.device | str) -> _Batch:
        """What the model and the loss read on `device`; the rest stays on the host for the log."""


@dataclass(frozen=True, kw_only=True)
class RetrievalBatch:
    """One rank's share of one step: Q queries and their groups of passages, the positive (or positives) first
    in each group.

    `texts` holds the Q queries, then the P passages by group: query i owns the passages group_offsets_Q1[i]
    to group_offsets_Q1[i+1] - 1. Two queries with groups of 2 and 1:

        texts  q0 q1 | p00 p01 | p10       group_offsets_Q1  0 2 3
    """

    texts: PackedTexts
    group_offsets_Q1: Tensor
    """int64; group sizes may differ."""
    rows_Q: Tensor
    """int64: row of each query among all datasets; names the sample in logs and resume tests."""
    passage_hashes_P: Tensor
    """int64: hash of the passage's text; equal text anywhere in the global batch is no negative."""
    known_positive_hashes_QM: Tensor | None = None
    """int64: hashes of all positives of the query's record, also those not drawn; shorter rows repeat one.
    None: no record has more than the one drawn."""
    query_hashes_Q: Tensor | None = None
    """int64, on the CPU: hash of the query's text; rows that ask the same share their known positives. None:
    not known, and no row counts as asked twice."""
    teacher_scores_P: Tensor | None = None
    """float32: scores of a teacher (a re-ranker), when the records carry them."""
    in_batch_negatives: bool = True
    """False restricts every softmax to the query's own group."""
    dataset: str = ""
    language: str = ""
    num_truncated: int = 0
    """Texts of this batch cut at their limit."""
    group_sizes: tuple[int, ...] = ()
    """Passages of each query, on the host; read from the offsets where nobody gives them."""
    positive_counts: tuple[int, ...] = ()
    """Drawn positives that open each query's group, on the host; () where each has one."""

    def __post_init__(self) -> None:
        if len(self.group_sizes) != self.num_queries:
            sizes = (self.group_offsets_Q1[1:] - self.group_offsets_Q1[:-1]).tolist()
            object.__setattr__(self, "group_sizes", tuple(sizes))

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
        """All that the loss reads on `device`; rows and hashes of queries stay on the host, where the log and
        the search for questions asked twice read them without waiting for the device."""
        moved = map_tensors(self, copy_to(device))
        return replace(moved, rows_Q=self.rows_Q, query_hashes_Q=self.query_hashes_Q)


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
    pair_counts: tuple[int, ...] = ()
    """Pairs of each text, on the host; read from the offsets where nobody knows them, which waits for the
    device."""
    row_counts: tuple[int, ...] = ()
    """Multi-vector rows of each text, likewise."""

    def __post_init__(self) -> None:
        for name, offsets in (
            ("pair_counts", self.lexical_offsets_N1),
            ("row_counts", self.multi_offsets_N1),
        ):
            if len(getattr(self, name)) != offsets.shape[0] - 1:
                object.__setattr__(self, name, tuple((offsets[1:] - offsets[:-1]).tolist()))

    @property
    def num_texts(self) -> int:
        """N."""
        return int(self.dense_ND.shape[0])

    def select(self, start: int, stop: int) -> Representations:
        """Texts start..stop-1 (views, gradients flow)."""
        z0, z1 = sum(self.pair_counts[:start]), sum(self.pair_counts[:stop])
        k0, k1 = sum(self.row_counts[:start]), sum(self.row_counts[:stop])
        return Representations(
            dense_ND=self.dense_ND[start:stop],
            lexical_weights_Z=self.lexical_weights_Z[z0:z1],
            lexical_ids_Z=self.lexical_ids_Z[z0:z1],
            lexical_offsets_N1=self.lexical_offsets_N1[start : stop + 1] - z0,
            multi_KC=self.multi_KC[k0:k1],
            multi_offsets_N1=self.multi_offsets_N1[start : stop + 1] - k0,
            pair_counts=self.pair_counts[start:stop],
            row_counts=self.row_counts[start:stop],
        )

    def split(self, sizes: Sequence[int]) -> list[Representations]:
        """Consecutive runs of `sizes` texts, which add up to all of them; gradients of all runs come back in
        one tensor.

        `select` per run would, in the backward pass, make a tensor of the whole size for every run.
        """
        edges = [0, *accumulate(sizes)]
        assert edges[-1] == self.num_texts, "the runs must cover all texts"
        runs = [slice(start, stop) for start, stop in zip(edges, edges[1:])]
        pairs = [sum(self.pair_counts[run]) for run in runs]
        rows = [sum(self.row_counts[run]) for run in runs]
        dense, vectors = self.dense_ND.split(list(sizes)), self.multi_KC.split(rows)
        weights, ids = self.lexical_weights_Z.split(pairs), self.lexical_ids_Z.split(pairs)
        return [
            Representations(
                dense_ND=dense[n],
                lexical_weights_Z=weights[n],
                lexical_ids_Z=ids[n],
                lexical_offsets_N1=self.lexical_offsets_N1[run.start : run.stop + 1] - sum(pairs[:n]),
                multi_KC=vectors[n],
                multi_offsets_N1=self.multi_offsets_N1[run.start : run.stop + 1] - sum(rows[:n]),
                pair_counts=self.pair_counts[run],
                row_counts=self.row_counts[run],
            )
            for n, run in enumerate(runs)
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
                pair_counts=(0,) * self.num_texts,
            )
        if "multi_vector" not in heads:
            none = (0,) * self.num_texts
            kept = replace(kept, multi_KC=kept.multi_KC[:0], multi_offsets_N1=none_N1, row_counts=none)
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
        pair_counts=tuple(chain.from_iterable(p.pair_counts for p in parts)),
        row_counts=tuple(chain.from_iterable(p.row_counts for p in parts)),
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
