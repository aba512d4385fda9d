"""What a step computes, as a recipe says it: the objective sections, told apart by `kind`, and the weights in
them.

The sections that come with megam3 stand here rather than beside their objectives, because `show-config` and
the checks read them without torch.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megam3.config.section import Section, Seed
from megam3.config.weights import (
    HeadName,
    HeadWeights,
    LossWeights,
    ScoreTemperatures,
    SparsityConfig,
    over_losses,
    preset_weights,
)
from megam3.encoders import is_causal
from megam3.errors import ConfigError


class ObjectiveConfig(Section):
    """Base of the `objective` sections: what the checks and the memory plan ask of any stage. `kind` tells
    them apart.

    A stage that is not in megam3 itself subclasses it beside its objective (see docs/architecture.md).
    """

    kind: str
    """Which stage this section describes."""

    data_kind: ClassVar[Literal["pair", "text"]] = "pair"
    """Records the stage trains on: {"query", "pos"} or {"text"}."""
    can_evaluate: ClassVar[bool] = True
    """Whether the model in training ranks passages, so that evaluation.folders can be run."""

    def problems(self) -> Iterator[ConfigError]:
        """Rules of this section that join several of its fields."""
        yield from ()

    def encoder_problems(self, encoder: Mapping[str, Any]) -> Iterator[ConfigError]:
        """Rules that join this section and the encoder's config.json."""
        yield from ()

    def scored_heads(self) -> tuple[HeadName, ...]:
        """Heads whose scores over the global batch the loss holds; none for a stage that ranks nothing."""
        return ()

    def num_dimensions(self) -> int:
        """Lengths at which the dense vector is scored besides its own."""
        return 0

    def tiling(self) -> Literal["auto", "always", "never"]:
        """Whether those scores are formed in tiles."""
        return "auto"

    def predictions_per_token(self) -> float:
        """Rows a token that a masked-LM head projects onto the vocabulary; 0: there is no such head."""
        return 0.0

    def has_decoder(self) -> bool:
        """Whether a one-layer decoder of the encoder's width reads its output."""
        return False

    def has_bag_of_words(self) -> bool:
        """Whether one more of those rows is pooled by text."""
        return False

    def needs_scores(self) -> str | None:
        """Field of this section that is idle without teacher scores in the records; None: not asked for."""
        return None


class PretrainConfig(ObjectiveConfig):
    """RetroMAE on documents (arXiv 2205.12035), or plain masked LM without the decoder."""

    kind: Literal["pretrain"] = "pretrain"
    """Which objective this section describes."""
    data_kind: ClassVar[Literal["pair", "text"]] = "text"
    can_evaluate: ClassVar[bool] = False
    decoder: bool = True
    """Rebuild the text from `<s>` by a one-layer decoder; false: masked LM alone."""
    encoder_mask_share: float = Field(default=0.3, gt=0, lt=1)
    """Share of each text's ordinary tokens hidden from the encoder, in whole words (the paper's 0.3)."""
    decoder_mask_share: float = Field(default=0.5, ge=0.5, lt=1)
    """Share of the other tokens that a row of the decoder does not read (the paper's 0.5)."""
    decoder_weight: PositiveFloat = 1.0
    """Weight of the decoder's loss beside the encoder's (the paper adds them)."""
    bag_of_words_weight: NonNegativeFloat = 0.0
    """Weight of the bag-of-words loss beside them, which trains the tokens other than `<s>` (DupMAE,
    arXiv 2211.08769); 0: off. Costs the vocabulary's products of every token."""
    mask_token_share: float = Field(default=0.8, ge=0, le=1)
    """Share of hidden tokens that become `<mask>` (BERT, arXiv 1810.04805)."""
    random_token_share: float = Field(default=0.1, ge=0, le=1)
    """Share of hidden tokens that become a random one; the rest stays."""
    mask_seed: Seed = 0
    """Selects the masks, together with step and row."""

    def predictions_per_token(self) -> float:
        """Of the encoder its masked tokens, of the decoder all, of the bag of words all."""
        return self.encoder_mask_share + self.decoder + (self.bag_of_words_weight > 0)

    def has_decoder(self) -> bool:
        """As the recipe says."""
        return self.decoder

    def has_bag_of_words(self) -> bool:
        """Where it has a weight."""
        return self.bag_of_words_weight > 0

    def encoder_problems(self, encoder: Mapping[str, Any]) -> Iterator[ConfigError]:
        """A hidden token is guessed from both sides."""
        if is_causal(encoder):
            rule = "masked language modelling needs both directions, and the encoder reads left to right"
            yield ConfigError("objective.kind", self.kind, rule, "set model.attention: bidirectional")

    def problems(self) -> Iterator[ConfigError]:
        """The two shares of replaced tokens are parts of one whole."""
        if self.mask_token_share + self.random_token_share > 1:
            yield ConfigError(
                "objective.random_token_share",
                self.random_token_share,
                f"must be at most 1 - mask_token_share = {1 - self.mask_token_share:g}",
                "lower one of them",
            )


class UnifiedConfig(ObjectiveConfig):
    """InfoNCE on three heads and their sum, plus self-distillation (arXiv 2402.03216, section 3.3)."""

    kind: Literal["unified"] = "unified"
    """Which objective this section describes."""
    heads: list[HeadName] = Field(default=["dense", "lexical", "multi_vector"], min_length=1)
    """Heads that exist and are trained; the others are neither computed nor allocated."""
    preset: Literal["m3", "m3_v1", "joint"] = "m3"
    """Weights of: the released code and later paper; the paper's first version (all 1); heads alone, without
    sum and distillation."""
    temperature: PositiveFloat = 0.02
    """Divides every score before the softmax (arXiv 2402.03216, section 4.1, and FlagEmbedding 1.4.2)."""
    temperatures: ScoreTemperatures = ScoreTemperatures()
    """Temperatures of single scores, in their InfoNCE and in distillation, over `temperature`."""
    sum_weights: HeadWeights | None = None
    """Weights of the heads in the combined score; what is not given: the preset's."""
    loss_weights: LossWeights | None = None
    """Weights of the InfoNCE losses; what is not given: the preset's."""
    distill_weights: HeadWeights | None = None
    """Weights of the self-distillation losses; what is not given: the preset's."""
    self_distill: bool = True
    """Let the combined score teach each head."""
    self_distill_start_step: NonNegativeInt = 0
    """Optimizer steps before self-distillation begins."""
    teacher: Literal["kl_div", "m3_kd_loss"] | None = None
    """Distillation from teacher scores in the records; None: off."""
    teacher_temperature: PositiveFloat = 1.0
    """Divides the teacher's scores before their softmax (FlagEmbedding 1.4.2 takes them as they are: 1)."""
    teacher_student_temperature: PositiveFloat | None = None
    """Divides a score before the softmax that the teacher is compared with, with `kl_div` (arXiv 1503.02531,
    section 2, takes one temperature for both); None: the score's own, as FlagEmbedding 1.4.2."""
    teacher_weights: LossWeights | None = None
    """Weight of the teacher's loss on each score, beside the InfoNCE's in `loss_weights`; None: the same, as
    FlagEmbedding 1.4.2; what is not given: that of `loss_weights`."""
    teacher_keeps_infonce: bool | None = None
    """Train InfoNCE beside the teacher's loss; None: with `kl_div` (added to it), not with `m3_kd_loss` (in
    its place), as FlagEmbedding 1.4.2."""
    matryoshka_dims: list[PositiveInt] | None = Field(default=None, min_length=1)
    """Also train the first d entries of the dense vector to rank by themselves, for each d here, ascending
    (arXiv 2205.13147); the mean of their losses is added to the dense head's; None: off."""
    matryoshka_weights: list[NonNegativeFloat] | None = None
    """Weight of each of `matryoshka_dims` in that mean; None: 1 each, as the paper's."""
    both_directions: bool = False
    """Also rank the queries for each drawn positive, by the dense head; added to its loss."""
    sparsity: SparsityConfig | None = None
    """Regulariser of the lexical weights, added to the loss as it is; None: off."""
    maxsim: Literal["mean", "sum"] = "mean"
    """Mean over query tokens (the paper) or plain sum (ColBERT)."""
    loss_tiles: Literal["auto", "always", "never"] = "auto"
    """Compute the loss in tiles, without a score matrix: exact, about twice the scoring time; auto: past 64 M
    scores a head, or 4 GB of MaxSim's winners."""
    mask_false_negatives: bool = True
    """Leave out columns whose text equals a known positive of the query: any in its record, drawn or not, and
    any of another row of the batch that asks the same."""
    false_negative_margin: float | None = None
    """Leave out columns whose score exceeds the positive's by more than this; None: off."""
    false_negative_margin_source: Literal["sum", "teacher"] = "sum"
    """Which score the margin rule compares: the heads' combined score, or the teacher's (of the own group
    only)."""

    @model_validator(mode="before")
    @classmethod
    def _complete_weights(cls, given: Any) -> Any:
        """Put a table's missing weights from the preset, so that one override changes one weight.

        Here, not where the tables are used: recipe.yaml then holds the numbers that were trained with.
        """
        if not isinstance(given, dict):
            return given
        completed = dict(given)
        for name, preset in preset_weights(given.get("preset", "m3")).items():
            table = given.get(name)
            if isinstance(table, HeadWeights):
                completed[name] = preset.model_copy(update=table.model_dump(exclude_unset=True))
            elif isinstance(table, dict):
                completed[name] = {**preset.model_dump(), **table}
        completed["teacher_weights"] = over_losses(completed)
        return completed

    def problems(self) -> Iterator[ConfigError]:
        """Something must be trained, and each head once."""
        if len(set(self.heads)) < len(self.heads):
            yield ConfigError("objective.heads", self.heads, "names a head twice", "name each head once")
        for name in ("sum_weights", "loss_weights", "distill_weights", "teacher_weights"):
            weights = getattr(self, name)
            if weights is not None and not any(weights.model_dump().values()):
                offs = {"distill_weights": "self_distill: false", "teacher_weights": "teacher: null"}
                off = offs.get(name, "null for the preset's")
                remedy = f"set one above 0, or {off}"
                yield ConfigError(f"objective.{name}", weights.model_dump(), "all weights are 0", remedy)
        yield from self._dense_problems()
        yield from self._teacher_problems()
        if self.sparsity is not None and "lexical" not in self.heads:
            rule = "regularises lexical weights, and objective.heads has no lexical head"
            remedy = "add lexical to objective.heads, or leave it out"
            yield ConfigError("objective.sparsity", self.sparsity.kind, rule, remedy)

    def _teacher_problems(self) -> Iterator[ConfigError]:
        """Settings of a teacher need one, and of a kind that reads them."""
        settings = {
            "teacher_weights": self.teacher_weights,
            "teacher_student_temperature": self.teacher_student_temperature,
            "teacher_keeps_infonce": self.teacher_keeps_infonce,
        }
        for name, value in settings.items():
            if value is not None and self.teacher is None:
                rule = "says how a teacher is learned from, and objective.teacher names none"
                yield ConfigError(f"objective.{name}", value, rule, "set objective.teacher, or leave it out")
        if self.teacher == "m3_kd_loss" and self.teacher_student_temperature is not None:
            rule = (
                "m3_kd_loss compares a group with all other columns, which have the score's own temperature"
            )
            remedy = "use teacher: kl_div, or set objective.temperatures"
            value = self.teacher_student_temperature
            yield ConfigError("objective.teacher_student_temperature", value, rule, remedy)

    def _dense_problems(self) -> Iterator[ConfigError]:
        """What is added to the dense head's loss needs that loss; dimensions and weights fit each other."""
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        is_trained = "dense" in self.heads and (self.loss_weights is None or self.loss_weights.dense > 0)
        for name, value in (("matryoshka_dims", dims), ("both_directions", self.both_directions)):
            if value and not is_trained:
                rule = "adds to the loss of the dense head, which is not trained"
                remedy = "add dense to objective.heads with a weight above 0, or leave this out"
                yield ConfigError(f"objective.{name}", value, rule, remedy)
        if dims is not None and dims != sorted(set(dims)):
            rule = "dimensions must ascend, each named once"
            yield ConfigError("objective.matryoshka_dims", dims, rule, f"write {sorted(set(dims))}")
        if weights is not None and len(weights) != len(dims or ()):
            rule = f"needs one weight for each of the {len(dims or ())} matryoshka_dims"
            yield ConfigError("objective.matryoshka_weights", weights, rule, "add or remove some, or null")
        elif weights is not None and not any(weights):
            remedy = "set one above 0, or matryoshka_dims: null"
            yield ConfigError("objective.matryoshka_weights", weights, "all weights are 0", remedy)

    def encoder_problems(self, encoder: Mapping[str, Any]) -> Iterator[ConfigError]:
        """A dense vector has as many entries as the encoder is wide."""
        dims, width = self.matryoshka_dims, encoder.get("hidden_size")
        if dims and width is not None and max(dims) > width:
            rule = f"the encoder's dense vectors have {width} entries"
            yield ConfigError("objective.matryoshka_dims", dims, rule, f"use at most {width}")

    def scored_heads(self) -> tuple[HeadName, ...]:
        """`heads`, in the order of every table."""
        return tuple(name for name in ("dense", "lexical", "multi_vector") if name in self.heads)

    def num_dimensions(self) -> int:
        """Of `matryoshka_dims`."""
        return len(self.matryoshka_dims or ())

    def tiling(self) -> Literal["auto", "always", "never"]:
        """`loss_tiles`."""
        return self.loss_tiles

    def needs_scores(self) -> str | None:
        """`teacher`, or the margin rule that compares the teacher's scores."""
        if self.teacher is not None:
            return "teacher"
        has_margin = self.false_negative_margin is not None and self.false_negative_margin_source == "teacher"
        return "false_negative_margin" if has_margin else None


def _section_of_kind(value: Any) -> Any:
    """The section that a recipe's `objective` describes, chosen by `kind` among all subclasses of
    ObjectiveConfig.

    Subclasses, not a closed union: a stage that is imported is known here, and the schema needs no edit for
    it. Without `kind` the section is the unified one, as in recipes from before there were several.
    """
    if not isinstance(value, dict):
        return value
    kinds = objective_kinds()
    kind = value.get("kind", "unified")
    if kind not in kinds:
        raise PydanticCustomError(
            "objective_kind", "must be one of: {kinds}", {"kinds": ", ".join(sorted(kinds))}
        )
    return kinds[kind].model_validate(value)


def objective_kinds() -> dict[str, type[ObjectiveConfig]]:
    """Every objective section known to this process, by `kind`."""
    found: dict[str, type[ObjectiveConfig]] = {}
    waiting = list(ObjectiveConfig.__subclasses__())
    while waiting:
        section = waiting.pop()
        waiting += section.__subclasses__()
        found[str(section.model_fields["kind"].default)] = section
    return found


ObjectiveSection = Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(_section_of_kind)]
"""Type of the recipe's `objective`: a union of all stages, told apart by `kind`."""
