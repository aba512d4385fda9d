"""Unified finetuning: InfoNCE on three heads and their sum, plus self-distillation (arXiv 2402.03216, section
3.3)."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megam3.batch import Progress, Representations, RetrievalBatch
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import ModelConfig
from megam3.encoders import EncoderShape
from megam3.gradcache import cached_step
from megam3.loss.dense import add_dense_losses
from megam3.loss.distillation import TeacherGroups
from megam3.loss.negatives import find_negatives, group_rows
from megam3.loss.rows import LossTerms
from megam3.loss.settings import resolve_settings
from megam3.loss.sparsity import sparsity_loss
from megam3.loss.unified import retrieval_loss
from megam3.model.m3 import M3Model, encoder_shape, is_head_parameter, represent
from megam3.model.pretrained import load_m3
from megam3.objectives.base import Objective, Trainee
from megam3.packed_texts import PackedTexts
from megam3.scoring.combine import count_over_ranks


class UnifiedObjective(Objective[UnifiedConfig]):
    """The objective for RetrievalBatch."""

    section_type = UnifiedConfig

    def __init__(self, section: UnifiedConfig, chunk_tokens: int | None = None):
        super().__init__(section, chunk_tokens)
        self._settings = resolve_settings(section)

    def load_model(self, config: ModelConfig, dtype: torch.dtype) -> M3Model:
        """See `megam3.objectives.base.Objective`; heads that are not trained are not allocated."""
        return load_m3(config.path, config, heads=self.section.scored_heads(), dtype=dtype)

    def shape(self, model: nn.Module) -> EncoderShape:
        """See `megam3.objectives.base.Objective`."""
        assert isinstance(model, M3Model)
        return encoder_shape(model)

    def is_head_parameter(self, name: str) -> bool:
        """See `megam3.objectives.base.Objective`."""
        return is_head_parameter(name)

    def represent(self, forward: Callable[..., Any], texts: PackedTexts) -> Representations:
        """See `megam3.objectives.base.Objective`."""
        return represent(forward, texts)

    def run(self, engine: Trainee, batch: RetrievalBatch, progress: Progress) -> dict[str, Tensor]:
        """See `megam3.objectives.base.Objective`."""

        def encode(texts: PackedTexts) -> Representations:
            return represent(engine.forward, texts)

        def loss(representations: Representations) -> tuple[Tensor, dict[str, Tensor]]:
            terms = self._loss(representations, batch, progress.step)
            return terms.total, _figures(
                terms, representations, batch.num_queries, self.section.scored_heads()
            )

        return cached_step(batch.texts, self.chunk_tokens, encode, loss, engine.backward)

    def warnings(self, figures: Mapping[str, float], dead_head_share: float) -> Iterator[str]:
        """A lexical head whose weights are all zero, or vectors that are all the same, no longer learn."""
        for name in ("lexical/nonzero_share", "dense/spread", "multi_vector/spread"):
            value = figures.get(name, math.inf)
            if value < dead_head_share:
                yield (
                    f"the {name.split('/')[0]} head is dying ({name} = {value:.2g} < {dead_head_share:.2g});"
                    " lower optim.lr or optim.head_lr, or lengthen optim.warmup_ratio"
                )

    def _loss(self, representations: Representations, batch: RetrievalBatch, step: int) -> LossTerms:
        settings = self._settings
        queries, passages = representations.split([batch.num_queries, batch.num_passages])
        counts = count_over_ranks(queries, passages, batch.query_hashes_Q)
        negatives = find_negatives(batch, self.section.mask_false_negatives, counts)
        teacher = None
        wants_teacher = settings.teacher is not None or settings.margin_source == "teacher"
        if wants_teacher and batch.teacher_scores_P is not None:
            columns_QG, exists_QG = negatives.group_columns()
            scores_QG = group_rows(batch.teacher_scores_P, batch.group_offsets_Q1, batch.group_sizes, 0.0)
            teacher = TeacherGroups(scores_QG, columns_QG, exists_QG)
        terms = retrieval_loss(
            queries,
            passages,
            negatives=negatives,
            settings=settings,
            counts=counts,
            distill=settings.distills(step),
            teacher=teacher,
            tiles=self.section.loss_tiles,
        )
        terms = add_dense_losses(
            terms,
            queries,
            passages,
            negatives=negatives,
            settings=settings,
            counts=counts,
            tiles=self.section.loss_tiles,
        )
        if self.section.sparsity is None:
            return terms
        added, named = sparsity_loss(
            queries, passages, self.section.sparsity, sum(counts.queries), sum(counts.passages), step
        )
        return replace(terms, total=terms.total + added, terms={**terms.terms, **named})


def _figures(
    terms: LossTerms, representations: Representations, num_queries: int, heads: Collection[str]
) -> dict[str, Tensor]:
    """Loss and accuracy per head, and the vital signs of the heads: a dead one shows here long before an
    evaluation."""
    weights_Z = representations.lexical_weights_Z.detach()
    passages = representations.select(num_queries, representations.num_texts)
    figures = {
        "loss/total": terms.total.detach(),
        **{f"loss/{name}": value for name, value in terms.terms.items()},
        **{f"accuracy/{name}": value for name, value in terms.accuracy.items()},
    }
    if "lexical" in heads:
        figures["lexical/nonzero_share"] = (weights_Z > 0).float().sum() / max(1, weights_Z.numel())
        figures["lexical/mean_weight"] = weights_Z.float().sum() / max(1, weights_Z.numel())
    if "dense" in heads:
        figures["dense/spread"] = spread(passages.dense_ND)
    if "multi_vector" in heads:
        figures["multi_vector/spread"] = spread(passages.multi_KC)
    return figures


def spread(vectors_RC: Tensor) -> Tensor:
    """1 − |mean|² of unit rows: 0 when all are equal (a collapsed head), near 1 when they point
    everywhere."""
    return 1.0 - torch.mean(vectors_RC.detach().float(), dim=0).square().sum()
