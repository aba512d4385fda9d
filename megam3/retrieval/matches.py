"""Which words of a passage a query matched, by the lexical head and by the alignment of multi-vectors.

lexical        a passage token whose id the query holds, too: w_q · w_p, its term of the lexical score
multi_vector   each query token picks its most similar passage token (MaxSim); what a passage token is picked
               for, summed and divided by the number of query tokens, adds up to the multi-vector score

Tokens are shown by their place in the text, so that the pieces joined are the text again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megam3.embedder import M3Embedder
from megam3.retrieval.index.vectors import TextVectors, encode_vectors


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A piece of a passage's text and what it contributed to the scores."""

    text: str
    lexical: float
    multi_vector: float


@dataclass(frozen=True, kw_only=True)
class TokenShares:
    """What each token of a passage, special ones included, contributed: float32 [n] each."""

    lexical_T: np.ndarray
    multi_vector_T: np.ndarray


def matched_segments(
    embedder: M3Embedder, query: str, passages: Sequence[str], *, max_tokens: int, instruction: str = ""
) -> list[list[Segment]]:
    """The text of each passage in pieces; those that matched hold what they contributed.

    A token beyond `max_tokens` was not read and contributes nothing; those of an `instruction`, which was put
    before every passage, are not shown.
    """
    if not passages:
        return []
    limit = min(max_tokens, embedder.max_tokens)
    read = [instruction + passage for passage in passages]
    texts = [query, *read]
    heads = embedder.heads
    vectors = encode_vectors(
        embedder,
        texts,
        max_tokens=limit,
        lexical="lexical" in heads,
        new_multi=(lambda shape: np.empty(shape, "f4")) if "multi_vector" in heads else None,
    )
    token_ids = embedder.token_arrays(texts, max_tokens=limit)
    offsets = embedder.token_offsets(read, max_tokens=limit)
    before = len(instruction)
    return [
        _cut(
            passage,
            [(max(0, start - before), stop - before) for start, stop in spans],
            token_shares(vectors, 0, number, ids),
        )
        for number, (passage, spans, ids) in enumerate(zip(passages, offsets, token_ids[1:]), 1)
    ]


def token_shares(vectors: TextVectors, query: int, passage: int, ids_T: np.ndarray) -> TokenShares:
    """Contribution of each token `ids_T` of text `passage` to its scores with text `query`.

    An id that occurs several times has one weight, its largest; each of its places shows it.
    """
    lexical_T = np.zeros(len(ids_T), dtype=np.float32)
    own = dict(zip(*(values.tolist() for values in vectors.lexical(passage))))
    for token, weight in zip(*(values.tolist() for values in vectors.lexical(query))):
        lexical_T[ids_T == token] = weight * own.get(token, 0.0)
    multi_T = np.zeros(len(ids_T), dtype=np.float32)
    if vectors.multi_KC is None:
        return TokenShares(lexical_T=lexical_T, multi_vector_T=multi_T)
    query_KC, passage_KC = vectors.multi(query), vectors.multi(passage)
    if len(query_KC) and len(passage_KC):
        scores_KL = query_KC @ passage_KC.T
        best_K = scores_KL.argmax(axis=1)
        # where the first token (`<s>`) has no row, the others' are one place further left
        first = len(ids_T) - len(passage_KC)
        np.add.at(multi_T, best_K + first, scores_KL.max(axis=1) / len(query_KC))
    return TokenShares(lexical_T=lexical_T, multi_vector_T=multi_T)


def _cut(text: str, spans: Sequence[tuple[int, int]], shares: TokenShares) -> list[Segment]:
    segments: list[Segment] = []
    done = 0

    def add(stop: int, lexical: float, multi_vector: float) -> None:
        nonlocal done
        if stop > done:
            segments.append(Segment(text=text[done:stop], lexical=lexical, multi_vector=multi_vector))
            done = stop

    for (start, stop), lexical, multi in zip(
        spans, shares.lexical_T.tolist(), shares.multi_vector_T.tolist()
    ):
        # special tokens have no text of their own; a character cut into several tokens is shown once
        if stop > max(start, done) and (lexical > 0 or multi > 0):
            add(start, 0.0, 0.0)
            add(stop, lexical, multi)
    add(len(text), 0.0, 0.0)
    return segments
