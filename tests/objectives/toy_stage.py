"""A whole training stage in one file: queries and their positives are pulled together by the cosine of their
dense vectors.

docs/architecture.md shows it as the example of a new stage; nothing in megam3 knows it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor

from megam3.batch import Progress, RetrievalBatch
from megam3.config.objective import ObjectiveConfig
from megam3.config.schema import ModelConfig
from megam3.encoders import EncoderShape
from megam3.errors import ConfigError
from megam3.model.m3 import M3Model, encoder_shape, represent
from megam3.model.pretrained import load_m3
from megam3.objectives.base import Objective, Trainee
from tests.launches import train_calls


class AlignmentConfig(ObjectiveConfig):
    """The `objective` section of a recipe with `kind: alignment`."""

    kind: Literal["alignment"] = "alignment"
    can_evaluate: ClassVar[bool] = False
    scale: PositiveFloat = 1.0
    """Factor of the loss."""

    def problems(self) -> Iterator[ConfigError]:
        """A loss this large would be clipped away."""
        if self.scale > 100:
            yield ConfigError("objective.scale", self.scale, "must be at most 100", "lower it")


class AlignmentObjective(Objective[AlignmentConfig]):
    """1 − cosine, averaged over the queries of all ranks (equally many on each)."""

    section_type = AlignmentConfig

    def load_model(self, config: ModelConfig, dtype: torch.dtype) -> M3Model:
        return load_m3(config.path, config, heads=("dense",), dtype=dtype)

    def shape(self, model: Any) -> EncoderShape:
        return encoder_shape(model)

    def run(self, engine: Trainee, batch: RetrievalBatch, progress: Progress) -> dict[str, Tensor]:
        dense_ND = represent(engine.forward, batch.texts).dense_ND
        queries_QD, passages_PD = dense_ND[: batch.num_queries], dense_ND[batch.num_queries :]
        cosine = (queries_QD * passages_PD[batch.group_offsets_Q1[:-1]]).sum(1).mean()
        loss = self.section.scale * (1 - cosine)
        engine.backward(loss, True)
        return {"loss/total": loss.detach(), "alignment/cosine": cosine.detach()}

    def warnings(self, figures: Mapping[str, float], dead_head_share: float) -> Iterator[str]:
        if figures["alignment/cosine"] < 1:
            yield "queries and positives are not aligned yet"


def calls_with_this_stage(calls: Sequence[Mapping[str, Any]]) -> dict[str, dict]:
    """`train_calls` in a process that has imported this file."""
    return train_calls(calls)
