"""BM25 over the model's own tokens: what plain counting reaches with the same text, the line every head has
to pass."""

from __future__ import annotations

from collections.abc import Sequence

import bm25s
import torch

from megam3.dist import comm
from megam3.retrieval.topk import NO_ROW, Hits, top_k


def _words(token_ids: Sequence[Sequence[int]]) -> list[list[str]]:
    """Ids as words for bm25s, without the special tokens at both ends."""
    return [[str(token) for token in ids[1:-1]] for ids in token_ids]


def bm25_hits(
    query_ids: Sequence[Sequence[int]], passage_ids: Sequence[Sequence[int]], num_hits: int
) -> Hits:
    """The best passages by BM25 (Lucene's variant, k1 1.5, b 0.75: bm25s' defaults) of token ids that include
    both special tokens.

    Each rank scores its share of the queries over the whole corpus; every rank gets all hits. A score of 0 is
    no hit.
    """
    num_hits = min(num_hits, len(passage_ids))
    index = bm25s.BM25()
    index.index(_words(passage_ids), show_progress=False)
    scores_QK = torch.zeros(len(query_ids), num_hits)
    rows_QK = torch.zeros(len(query_ids), num_hits, dtype=torch.int64)
    for query in range(comm.rank(), len(query_ids), comm.world_size()):
        known = [word for word in _words([query_ids[query]])[0] if word in index.vocab_dict]
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
