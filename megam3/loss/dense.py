"""Two options of the dense head's loss, both `retrieval_loss` of other vectors: exact over ranks.

    L_dense + Σ_d c_d · L(d) / M    Matryoshka, M dims d with weights c (arXiv 2205.13147, equation 1): L(d):
                                    InfoNCE of the first d entries of every vector, normalised anew
            + L(positive → query)   both directions: InfoNCE of each drawn positive against all ranks' queries
                                    (arXiv 2103.00020, figure 3), the mean over all ranks' drawn positives

The sum takes the weight that L_dense has in L, and shares its half while self-distillation is on. Each
InfoNCE sees the columns that `Negatives` shows; margin rule, distillation and teachers do not touch them.

Cost: for each of them one dense score matrix more, or its tiles, and one more exchange of dense vectors.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from megam3.batch import Representations
from megam3.config.weights import LossWeights
from megam3.dist import comm
from megam3.dist.gather import gather_rows
from megam3.loss.negatives import Negatives, widen
from megam3.loss.rows import LossTerms
from megam3.loss.settings import LossSettings
from megam3.loss.unified import retrieval_loss
from megam3.scoring.combine import RankCounts

PASSAGE_TO_QUERY = "passage_to_query"
"""Name of the second direction in the log."""


def add_dense_losses(
    terms: LossTerms,
    queries: Representations,
    passages: Representations,
    *,
    negatives: Negatives,
    settings: LossSettings,
    counts: RankCounts,
    tiles: Literal["auto", "always", "never"] = "auto",
) -> LossTerms:
    """`terms` and what the settings add to the dense head's loss; every rank calls it.

    Args: as `retrieval_loss`, whose result `terms` is.
    """
    losses: dict[str, LossTerms] = {}
    weights: dict[str, float] = {}
    queries, passages = queries.keep_heads(("dense",)), passages.keep_heads(("dense",))
    infonce = _dense_infonce(settings)
    for dim, weight in settings.matryoshka.items():
        name = f"dense_{dim}"
        weights[name] = weight
        losses[name] = retrieval_loss(
            _cut(queries, dim),
            _cut(passages, dim),
            negatives=negatives,
            settings=infonce,
            counts=counts,
            distill=False,
            tiles=tiles,
        )
    # without in-batch negatives a positive has no query but its own: nothing to tell apart
    if settings.both_directions and negatives.in_batch_negatives:
        weights[PASSAGE_TO_QUERY] = 1.0
        losses[PASSAGE_TO_QUERY] = _passage_to_query(queries, passages, negatives, infonce, counts, tiles)
    share = settings.loss_weights.dense / settings.loss_divisor
    if any(name.startswith("distill_") for name in terms.terms):
        share /= 2
    total = terms.total
    for name, loss in losses.items():
        total = total + share * weights[name] * loss.total
    return LossTerms(
        total,
        {**terms.terms, **{name: loss.terms["dense"] for name, loss in losses.items()}},
        {**terms.accuracy, **{name: loss.accuracy["dense"] for name, loss in losses.items()}},
    )


def _dense_infonce(settings: LossSettings) -> LossSettings:
    """The same temperature, and InfoNCE of the dense head alone."""
    return replace(
        settings,
        sum_weights=None,
        loss_weights=LossWeights(dense=1.0, lexical=0.0, multi_vector=0.0, sum=0.0),
        loss_divisor=1.0,
        distill_weights=None,
        teacher=None,
        false_negative_margin=None,
        margin_source="sum",
    )


def _cut(texts: Representations, dim: int) -> Representations:
    return replace(texts, dense_ND=normalize(texts.dense_ND[:, :dim], dim=-1))


def _passage_to_query(
    queries: Representations,
    passages: Representations,
    negatives: Negatives,
    settings: LossSettings,
    counts: RankCounts,
    tiles: Literal["auto", "always", "never"],
) -> LossTerms:
    """R rows are this rank's drawn positives, columns all ranks' queries, in the order of their positives:
    the query of row i is column i.

    A column whose query is known to be answered by the row's text is no negative: it drew the same text, has
    it among its record's positives, or asks the same question as the query that drew it. A query with several
    drawn positives has a column for each, of which other queries' rows see the first.
    """
    drawn = negatives.positives()
    query_R, place_R = drawn.rows()
    column_R = negatives.positive_column_Q[query_R] + place_R
    known_RM = negatives.known_positive_hash_QM[query_R]
    # one exchange of counts and widths, one of hashes: the last column says which of its query's it is
    sizes = comm.all_gather_ints([query_R.shape[0], known_RM.shape[1]])
    rows_W = tuple(num_rows for num_rows, _ in sizes)
    widest = max(width for _, width in sizes)
    answered = gather_rows(torch.cat([widen(known_RM, widest), place_R[:, None]], dim=1), rows_W)
    first = sum(rows_W[: comm.rank()])
    own_R = torch.arange(query_R.shape[0], device=query_R.device) + first
    turned = replace(
        negatives,
        positive_column_Q=own_R,
        group_stop_Q=own_R + 1,
        passage_hash_P=answered[:, 0],
        known_positive_hash_QM=negatives.passage_hash_P[column_R][:, None],
        answered_hash_PM=answered[:, :-1],
        own_row_only_P=answered[:, -1] > 0 if rows_W != counts.queries else None,
        group_sizes=(1,) * query_R.shape[0],
        positive_counts=(),
    )
    return retrieval_loss(
        _dense_only(passages, column_R - counts.first_passage),
        _dense_only(queries, query_R),
        negatives=turned,
        settings=settings,
        counts=replace(counts, queries=rows_W, passages=rows_W),
        distill=False,
        tiles=tiles,
    )


def _dense_only(texts: Representations, index_R: Tensor) -> Representations:
    """The dense vectors of these texts, and nothing of other heads."""
    none_N1 = texts.lexical_offsets_N1.new_zeros(index_R.shape[0] + 1)
    return replace(
        texts,
        dense_ND=texts.dense_ND.index_select(0, index_R),
        lexical_offsets_N1=none_N1,
        multi_offsets_N1=none_N1,
        pair_counts=(0,) * index_R.shape[0],
        row_counts=(0,) * index_R.shape[0],
    )
