"""BM25 over the model's own tokens: what plain counting reaches with the same text, the line every head has
to pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import bm25s
import torch

from megam3.dist import comm
from megam3.retrieval.topk import NO_ROW, Hits, top_k

Framing = tuple[int, int]
"""How many special tokens a tokenizer puts before and after every text."""


def find_framing(tokenize: Callable[[Sequence[str], int], Sequence[Sequence[int]]], limit: int) -> Framing:
    """Read off an empty text and a text: (1, 1) for XLM-R, (0, 1) for Qwen3-Embedding, (1, 0) for Llama.

    Args:
        tokenize: (texts, most tokens) -> ids with special tokens.
        limit: a number of tokens that it takes.
    """
    bare, framed = tokenize(["", "1"], limit)
    before = next((n for n, (a, b) in enumerate(zip(bare, framed)) if a != b), len(bare))
    return before, len(bare) - before


def _words(token_ids: Sequence[Sequence[int]], framing: Framing) -> list[list[str]]:
    """Ids as words for bm25s, without the special tokens."""
    before, after = framing
    return [[str(token) for token in ids[before : len(ids) - after]] for ids in token_ids]


def bm25_hits(
    query_ids: Sequence[Sequence[int]],
    passage_ids: Sequence[Sequence[int]],
    num_hits: int,
    framing: Framing = (1, 1),
) -> Hits:
    """The best passages by BM25 (Lucene's variant, k1 1.5, b 0.75: bm25s' defaults) of token ids that include
    special tokens, `framing` of them.

    Each rank scores its share of the queries over the whole corpus; every rank gets all hits. A score of 0 is
    no hit.
    """
    num_hits = min(num_hits, len(passage_ids))
    index = bm25s.BM25()
    index.index(_words(passage_ids, framing), show_progress=False)
    scores_QK = torch.zeros(len(query_ids), num_hits)
    rows_QK = torch.zeros(len(query_ids), num_hits, dtype=torch.int64)
    for query in range(comm.rank(), len(query_ids), comm.world_size()):
        known = [word for word in _words([query_ids[query]], framing)[0] if word in index.vocab_dict]
        if not known:
            scores_QK[query], rows_QK[query] = -torch.inf, NO_ROW
            continue
        scores_P = torch.from_numpy(index.get_scores(known)).float()
        hits = top_k(
            scores_P.masked_fill(scores_P <= 0, -torch.inf)[None],
            torch.arange(len(passage_ids))[None],
            num_hits,
        )
        scores_QK[query], rows_QK[query] = hits.scores_QK[0], hits.rows_QK[0]
    return Hits(comm.all_reduce_sum(scores_QK), comm.all_reduce_sum(rows_QK))
