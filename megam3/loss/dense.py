"""Two options of the dense head's loss, both `retrieval_loss` of other vectors: exact over ranks.

    L_dense + Σ_d c_d · L(d) / M    Matryoshka, M dims d with weights c (arXiv 2205.13147, equation 1): L(d):
                                    InfoNCE of the first d entries of every vector, normalised anew
            + L(positive → query)   both directions: InfoNCE of each drawn positive against all ranks' queries
                                    (arXiv 2103.00020, figure 3)

The sum takes the weight that L_dense has in L, and shares its half while self-distillation is on. Each
InfoNCE sees the columns that `Negatives` shows; margin rule, distillation and teachers do not touch them.

Cost: for each of them one dense score matrix more, or its tiles, and one more exchange of dense vectors.
"""

from dataclasses import replace
from typing import Literal

import torch
from torch.nn.functional import normalize

from megam3.batch import Representations
from megam3.config.objective import LossWeights
from megam3.dist import comm
from megam3.dist.gather import gather_rows
from megam3.loss.negatives import Negatives
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
    """Rows are this rank's drawn positives, columns all ranks' queries; query i is the positive of row i.

    A column whose query drew the same text is left out: it is no negative.
    """
    own_Q = negatives.positive_column_Q - counts.first_passage
    positives = replace(
        passages,
        dense_ND=passages.dense_ND.index_select(0, own_Q),
        lexical_offsets_N1=queries.lexical_offsets_N1,
        multi_offsets_N1=queries.multi_offsets_N1,
    )
    drawn_Q1 = negatives.known_positive_hash_QM[:, :1]
    column_Q = torch.arange(own_Q.shape[0], device=own_Q.device) + sum(counts.queries[: comm.rank()])
    turned = replace(
        negatives,
        positive_column_Q=column_Q,
        group_stop_Q=column_Q + 1,
        passage_hash_P=gather_rows(drawn_Q1.squeeze(1), counts.queries),
        known_positive_hash_QM=drawn_Q1,
    )
    return retrieval_loss(
        positives,
        queries,
        negatives=turned,
        settings=settings,
        counts=replace(counts, passages=counts.queries),
        distill=False,
        tiles=tiles,
    )
