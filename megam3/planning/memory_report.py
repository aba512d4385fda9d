"""From a recipe to the memory of one rank at the worst moment of a step, in words: for `megam3 plan-memory`
and for the start of a run.

Counted from config.json and the recipe by megam3/planning/memory.py; no weights are read, no device is
touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megam3.config.batch_size import longest_text
from megam3.config.schema import RunConfig
from megam3.data.lengths import LongestTexts
from megam3.encoders import counted_families, read_encoder_config
from megam3.planning.memory import largest_chunk, plan_memory, remedies
from megam3.planning.recipe import heaviest_step, read_model_shape, read_strategy, steps_of, strategies
from megam3.planning.shapes import MemoryPlan, ModelShape, StepShape, Strategy
from megam3.planning.strategy import Candidate, fitting

GIB = 1 << 30
CHOSEN_FROM = ("zero0", "zero1", "zero2", "zero3", "zero3_8k")
"""Templates that `fastest` tries: those whose states stay on the GPUs."""


def fastest(
    config: RunConfig,
    model: ModelShape,
    world_size: int,
    limit_bytes: int,
    longest: LongestTexts | None = None,
) -> list[Candidate]:
    """Settings for this recipe on GPUs that fit every length bucket, the fastest first: templates that keep
    all states on the GPUs, ways to save activations, sizes of chunks."""
    templates = strategies(config, CHOSEN_FROM, world_size, on_gpu=True)
    return fitting(model, templates, [step for _, step in steps_of(config, world_size, longest)], limit_bytes)


def choice_lines(candidates: list[Candidate], limit_bytes: int, num_shown: int = 4) -> list[str]:
    """The fastest setting with its predicted cost, and those that come next.

    Shown is the best of each template and way to save activations: others differ in chunk size alone.
    """
    limit = f"{limit_bytes / GIB:.1f} GiB"
    if not candidates:
        return [f"No setting of the templates {', '.join(CHOSEN_FROM)} fits in {limit}."]
    best: dict[tuple[str, bool, bool], Candidate] = {}
    for candidate in candidates:
        strategy = candidate.setting.strategy
        best.setdefault(
            (candidate.setting.template, strategy.checkpointing, strategy.activation_offload), candidate
        )
    lines = [
        f"  {each.cost:5.2f}  {each.peak_bytes / GIB:6.1f} GiB  {each.setting.fields()}"
        for each in list(best.values())[:num_shown]
    ]
    return [
        f"Fastest that fits in {limit}, then the next. Time in forward passes: 3 forward and backward,"
        " +1 gradient cache, +1 checkpointing, and communication by assumed rates.",
        *lines,
    ]


def lengths_line(config: RunConfig, longest: LongestTexts | None) -> str:
    """Which lengths a plan counts with."""
    limit = _spaced(longest_text(config.data))
    if longest is None:
        return f"Planned for the recipe's limit of {limit} tokens a text: there is no prepared store to ask."
    return (
        f"Planned for texts of at most {_spaced(longest.text_tokens)} tokens, the longest in the store"
        f" (limit {limit})."
    )


def table(config: RunConfig, edge: int, step: StepShape, strategy: Strategy, plan: MemoryPlan) -> list[str]:
    """What one rank holds, line by line."""
    what = "one pass" if step.chunk_tokens is None else f"chunks of {_spaced(step.pass_tokens)}"
    width = max(len(name) for name in [*plan.states, *plan.step])
    rows = [
        f"  {name.ljust(width)}  {value / GIB:9.2f}"
        for name, value in [*plan.states.items(), *plan.step.items()]
    ]
    return [
        f"Memory of one of {strategy.world_size} ranks in GiB: {config.engine.template} (ZeRO"
        f" {strategy.zero_stage}),"
        f" {'bf16' if strategy.precision_bytes == 2 else 'fp32'}, checkpointing"
        f" {_on(strategy.checkpointing)},"
        f" offload {_on(strategy.activation_offload)}",
        f"Heaviest step: texts up to {_spaced(edge)} tokens, {_spaced(step.num_queries)} queries"
        f" and {_spaced(step.num_passages)} passages"
        f" a rank, {_spaced(step.num_tokens)} tokens in {what}",
        *rows,
        f"  {'peak'.ljust(width)}  {plan.total_bytes / GIB:9.2f}",
    ]


def advice(
    model: ModelShape, strategy: Strategy, step: StepShape, limit_bytes: int
) -> tuple[list[str], bool]:
    """Sentences on what fits into `limit_bytes` and what to change, and whether anything fits at all."""
    limit = f"{limit_bytes / GIB:.1f} GiB"
    chunk = largest_chunk(model, strategy, step, limit_bytes)
    whole = plan_memory(model, strategy, replace(step, chunk_tokens=None)).total_bytes
    if whole <= limit_bytes:
        return [f"Fits in {limit} without the gradient cache: data.batch.chunk_tokens may stay unset."], True
    if chunk is not None:
        share = -(-step.num_tokens // chunk)
        return [
            f"Largest that fits in {limit}: data.batch.chunk_tokens={chunk} ({share} passes for"
            f" {_spaced(step.num_tokens)} tokens)."
        ], True
    settings = remedies(model, strategy, step, limit_bytes)
    if settings:
        names = " ".join(name for name, _ in settings)
        return [f"Does not fit in {limit}. Turn on: {names} data.batch.chunk_tokens={settings[-1][1]}"], True
    need = plan_memory(model, strategy, replace(step, chunk_tokens=step.longest_tokens)).total_bytes / GIB
    reason = f"one text at a time needs {need:.1f}"
    return [
        f"Does not fit in {limit} by any setting known here ({reason}): shorter texts, a smaller"
        " batch, or more ranks."
    ], False


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The plan of a run that starts, and what it takes to plan for a batch that ran."""

    lines: tuple[str, ...]
    """For the log."""
    model: ModelShape
    strategy: Strategy
    heaviest: StepShape
    """The step that needs most of all that the data can make."""

    @property
    def most_bytes(self) -> int:
        """Peak of the heaviest step."""
        return plan_memory(self.model, self.strategy, self.heaviest).total_bytes

    def bytes_of(self, lengths: Sequence[int], num_queries: int) -> int:
        """Peak of a rank's step over texts of these lengths, the first `num_queries` of them queries: to
        be compared with what that step held."""
        queries, passages = sum(lengths[:num_queries]), sum(lengths[num_queries:])
        num_passages = len(lengths) - num_queries
        step = replace(
            self.heaviest,
            num_queries=num_queries,
            num_passages=num_passages,
            query_tokens=-(-queries // max(1, num_queries)),
            passage_tokens=-(-passages // max(1, num_passages)),
        )
        return plan_memory(self.model, self.strategy, step).total_bytes


def plan_run(
    config: RunConfig, world_size: int, *, on_gpu: bool, longest: LongestTexts | None = None
) -> RunPlan | None:
    """The plan of a run that starts; None for encoders that are not counted."""
    encoder: dict[str, Any] = read_encoder_config(config.model.path)
    if encoder.get("model_type") not in counted_families():
        return None
    model, strategy = read_model_shape(config), read_strategy(config, world_size, on_gpu=on_gpu)
    edge, step = heaviest_step(config, model, strategy, longest)
    plan = plan_memory(model, strategy, step)
    lines = (lengths_line(config, longest), *table(config, edge, step, strategy, plan))
    return RunPlan(lines=lines, model=model, strategy=strategy, heaviest=step)
