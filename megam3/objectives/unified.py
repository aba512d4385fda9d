"""Unified finetuning: InfoNCE on three heads and their sum, plus self-distillation (arXiv 2402.03216, section 3.3)."""

import torch
from torch import Tensor

from megam3.batch import Progress, Representations, RetrievalBatch
from megam3.candidates import find_candidates, group_rows
from megam3.config.schema import UnifiedConfig
from megam3.dist import comm
from megam3.gradcache import cached_step
from megam3.losses import LossTerms, TeacherGroups, resolve_weights, unified_loss
from megam3.memory import loss_needs_tiles
from megam3.objectives.base import Encoder
from megam3.scoring.combine import RankCounts, count_over_ranks, score_global, score_heads
from megam3.scoring.split import split_texts
from megam3.tiled.loss import tiled_unified_loss


class UnifiedObjective:
    """The objective for RetrievalBatch; holds settings only."""

    def __init__(self, config: UnifiedConfig, chunk_tokens: int | None = None):
        """`chunk_tokens`: token budget of a gradient-cache chunk; None: one forward pass."""
        self._config, self._chunk_tokens = config, chunk_tokens
        self._settings = resolve_weights(config)

    def run(self, engine: Encoder, batch: RetrievalBatch, progress: Progress) -> dict[str, Tensor]:
        """See `megam3.objectives.base.Objective`."""

        def loss(representations: Representations) -> tuple[Tensor, dict[str, Tensor]]:
            terms = self._loss(representations, batch, progress.step)
            return terms.total, _figures(terms, representations, batch.num_queries)

        return cached_step(batch.texts, self._chunk_tokens, engine.encode, loss, engine.backward)

    def _loss(self, representations: Representations, batch: RetrievalBatch, step: int) -> LossTerms:
        settings, device = self._settings, representations.dense_ND.device
        queries, passages = split_texts(representations, [batch.num_queries, batch.num_passages])
        counts = count_over_ranks(queries, passages)
        # without in-batch negatives a query meets its own group alone: other ranks' passages would be scored only to be masked
        columns = counts.passages if batch.in_batch_negatives else None
        candidates = find_candidates(batch, self._config.mask_false_negatives, columns).to(device)
        teacher = None
        if settings.teacher is not None and batch.teacher_scores_P is not None:
            columns_QG, exists_QG = candidates.group_columns()
            teacher = TeacherGroups(
                group_rows(batch.teacher_scores_P, batch.group_offsets_Q1, 0.0).to(device),
                columns_QG,
                exists_QG,
            )
        distill = settings.distills(step)
        if self._tiles(counts):
            return tiled_unified_loss(
                queries, passages, candidates, settings, counts, distill, self._config.maxsim, teacher
            )
        scoring = (queries, passages, settings.sum_weights, self._config.maxsim, settings.heads)
        scores = score_global(*scoring, counts) if batch.in_batch_negatives else score_heads(*scoring)
        row_scale = comm.world_size() / sum(counts.queries)
        positive_Q = candidates.positive_column_Q
        return unified_loss(
            scores.by_name(), positive_Q, candidates.allowed(), settings, row_scale, distill, teacher
        )

    def _tiles(self, counts: RankCounts) -> bool:
        """Every rank decides by the same numbers, because the two losses talk differently."""
        if self._config.loss_tiles == "auto":
            query_rows = sum(counts.query_rows) if "multi_vector" in self._settings.heads else 0
            return loss_needs_tiles(
                max(counts.queries), sum(counts.passages), query_rows, max(counts.passages)
            )
        return self._config.loss_tiles == "always"


def _figures(terms: LossTerms, representations: Representations, num_queries: int) -> dict[str, Tensor]:
    """Loss and accuracy per head, and the vital signs of the heads: a dead one shows here long before an evaluation."""
    weights_Z = representations.lexical_weights_Z.detach()
    passages = representations.select(num_queries, representations.num_texts)
    return {
        "loss/total": terms.total.detach(),
        **{f"loss/{name}": value for name, value in terms.terms.items()},
        **{f"accuracy/{name}": value for name, value in terms.accuracy.items()},
        "lexical/nonzero_share": (weights_Z > 0).float().sum() / max(1, weights_Z.numel()),
        "lexical/mean_weight": weights_Z.float().sum() / max(1, weights_Z.numel()),
        "dense/spread": spread(passages.dense_ND),
        "multi_vector/spread": spread(passages.multi_KC),
    }


def spread(vectors_RC: Tensor) -> Tensor:
    """1 − |mean|² of unit rows: 0 when all are equal (a collapsed head), near 1 when they point everywhere."""
    return 1.0 - torch.mean(vectors_RC.detach().float(), dim=0).square().sum()
