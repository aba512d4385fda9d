"""Weights, temperatures and the regulariser that objectives read, and the paper's tables of them: small
sections, told apart from the stages that hold them."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from megam3.config.section import Section


class HeadWeights(Section):
    """One weight per head."""

    dense: NonNegativeFloat = 1.0
    """Weight of the dense head."""
    lexical: NonNegativeFloat = 1.0
    """Weight of the lexical head."""
    multi_vector: NonNegativeFloat = 1.0
    """Weight of the multi-vector head."""


HEADS = tuple(HeadWeights.model_fields)
"""dense, lexical, multi_vector: names of the heads, in the order of every table."""

HeadName = Literal["dense", "lexical", "multi_vector"]


class LossWeights(HeadWeights):
    """One weight per head and one for their sum."""

    sum: NonNegativeFloat = 1.0
    """Weight of the combined score's own loss; 0 leaves it out."""


class ScoreTemperatures(Section):
    """One temperature per score; None: `objective.temperature`."""

    dense: PositiveFloat | None = None
    """Divides the dense scores."""
    lexical: PositiveFloat | None = None
    """Divides the lexical scores, which are sums of products and not bounded by 1."""
    multi_vector: PositiveFloat | None = None
    """Divides the multi-vector scores; with `maxsim: sum` they grow with the query's length."""
    sum: PositiveFloat | None = None
    """Divides the combined score: as student of a teacher and as teacher of the heads."""


class SparsityConfig(Section):
    """A regulariser that keeps lexical weights few; meant for `model.lexical_kind: expansion`."""

    kind: Literal["flops", "l1"] = "flops"
    """flops: Σ over the vocabulary of (mean weight over the global batch)², which also spreads ids evenly
    (arXiv 2004.05665); l1: mean over texts of the sum of weights."""
    query_weight: NonNegativeFloat = 3e-4
    """Of the queries' term at full strength (λ_q of SPLADE-max in naver/splade,
    conf/config_splade++_max.yaml; `passage_weight` and `ramp_steps` are from there too)."""
    passage_weight: NonNegativeFloat = 1e-4
    """Of the passages' term at full strength (λ_d there)."""
    ramp_steps: PositiveInt = 50_000
    """Optimizer steps over which both weights grow with the square of the step (T there)."""


M3_SUM = HeadWeights(dense=1.0, lexical=0.3, multi_vector=1.0)
"""w1, w2, w3 of the combined score: arXiv 2402.03216v4, section 3.3, and FlagEmbedding 1.4.2
(`ensemble_score`)."""
M3_LOSS = LossWeights(dense=1.0, lexical=0.1, multi_vector=1.0, sum=1.0)
"""λ1, λ2, λ3 and 1: arXiv 2402.03216v4, section 3.3, and FlagEmbedding 1.4.2
(`EncoderOnlyEmbedderM3Model.forward`)."""
M3_DISTILL = HeadWeights(dense=1.0, lexical=0.1, multi_vector=1.0)
"""The same λ on the distillation losses."""
ONES = HeadWeights(dense=1.0, lexical=1.0, multi_vector=1.0)
"""arXiv 2402.03216v1, section 3.3: every weight 1."""
ONES_AND_SUM = LossWeights(dense=1.0, lexical=1.0, multi_vector=1.0, sum=1.0)
"""The same, with the combined score."""


def preset_weights(preset: str) -> dict[str, HeadWeights]:
    """The weight tables of a preset, by their field in `UnifiedConfig`."""
    if preset == "m3":
        return {"sum_weights": M3_SUM, "loss_weights": M3_LOSS, "distill_weights": M3_DISTILL}
    return {"sum_weights": ONES, "loss_weights": ONES_AND_SUM, "distill_weights": ONES}


def over_losses(given: Mapping[str, Any]) -> Any:
    """`teacher_weights` as given, missing weights taken from the InfoNCE's."""
    table = given.get("teacher_weights")
    if not isinstance(table, dict | LossWeights):
        return table
    base = given.get("loss_weights") or preset_weights(given.get("preset", "m3"))["loss_weights"]
    full = base if isinstance(base, dict) else {"sum": 1.0, **base.model_dump()}
    own = table if isinstance(table, dict) else table.model_dump(exclude_unset=True)
    return {**full, **own}
