"""From a recipe to the memory of one rank at the worst moment of a step, in words: for `megam3 plan-memory`
and for the start of a run.

Counted from config.json and the recipe by megam3/planning/memory.py; no weights are read, no device is
touched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megam3.config.batch_size import BucketStep, group_sizes, queries_in_buckets
from megam3.config.deepspeed import build_deepspeed_config
from megam3.config.schema import RunConfig
from megam3.encoders import counted_families, read_encoder_config
from megam3.errors import ConfigError
from megam3.planning.memory import (
    MemoryPlan,
    ModelShape,
    StepShape,
    Strategy,
    largest_chunk,
    plan_memory,
    remedies,
)
from megam3.planning.strategy import Candidate, fitting

GIB = 1 << 30
CHOSEN_FROM = ("zero0", "zero1", "zero2", "zero3", "zero3_8k")
"""Templates that `fastest` tries: those whose states stay on the GPUs."""
DEFAULT_BUCKET, DEFAULT_LIVE = 500_000_000, 1_000_000_000
"""DeepSpeed's own reduce_bucket_size and stage3_max_live_parameters, where a template is silent."""


def read_model_shape(config: RunConfig) -> ModelShape:
    """Sizes from the encoder's config.json and the recipe.

    Raises:
        ConfigError: no readable config.json, or a family whose layers are not counted.
    """
    encoder = read_encoder_config(config.model.path)
    family = encoder.get("model_type")
    if family not in counted_families():
        rule = "is an encoder whose activations this command has not counted"
        raise ConfigError(
            "model.path",
            f"{config.model.path} ({family})",
            rule,
            f"use one of: {', '.join(counted_families())}",
        )

    def dropout(override: float | None, key: str) -> float:
        return float(encoder.get(key, 0.0)) if override is None else override

    def size(key: str) -> int:
        value = encoder.get(key)
        if not isinstance(value, int):
            raise ConfigError(
                f"{config.model.path}/config.json: {key}",
                value,
                "must be a number",
                "use the encoder's own config.json",
            )
        return value

    return ModelShape(
        num_layers=size("num_hidden_layers"),
        hidden_size=size("hidden_size"),
        intermediate_size=size("intermediate_size"),
        num_attention_heads=size("num_attention_heads"),
        vocab_size=size("vocab_size"),
        num_positions=size("max_position_embeddings"),
        num_types=int(encoder.get("type_vocab_size", 1)),
        multi_vector_dim=config.model.multi_vector_dim or 0,
        hidden_dropout=dropout(config.model.hidden_dropout, "hidden_dropout_prob"),
        attention_dropout=dropout(config.model.attention_dropout, "attention_probs_dropout_prob"),
    )


def read_strategy(config: RunConfig, world_size: int, *, on_gpu: bool) -> Strategy:
    """Sharing and saving from the DeepSpeed template and the engine section."""
    final = build_deepspeed_config(config, world_size, has_gpu=on_gpu)
    zero = final["zero_optimization"]

    def offloads(key: str) -> bool:
        return (zero.get(key) or {}).get("device", "none") != "none"

    stage: int = zero["stage"]
    copies = 2 if zero.get("overlap_comm", stage == 3) and stage > 0 else 1
    return Strategy(
        zero_stage=stage,
        world_size=world_size,
        precision_bytes=2 if final["bf16"]["enabled"] else 4,
        checkpointing=config.engine.activation_checkpointing,
        activation_offload=config.engine.activation_offload,
        optimizer_offload=offloads("offload_optimizer"),
        parameter_offload=offloads("offload_param"),
        bucket_elements=zero.get("reduce_bucket_size", DEFAULT_BUCKET) * copies,
        live_parameters=zero.get("stage3_max_live_parameters", DEFAULT_LIVE),
        on_gpu=on_gpu,
    )


def heaviest_step(config: RunConfig, model: ModelShape, strategy: Strategy) -> tuple[int, StepShape]:
    """The length bucket (its upper edge) whose step needs most, when every text has the bucket's full length.

    Every group size of the recipe is tried: with a token budget, small groups make more queries of fewer
    passages.
    """
    return max(
        _steps(config, strategy.world_size),
        key=lambda step: plan_memory(model, strategy, step[1]).total_bytes,
    )


def fastest(config: RunConfig, model: ModelShape, world_size: int, limit_bytes: int) -> list[Candidate]:
    """Settings for this recipe on GPUs that fit every length bucket, the fastest first: templates that keep
    all states on the GPUs, ways to save activations, sizes of chunks."""
    engine = config.engine
    templates = {
        name: read_strategy(
            config.model_copy(update={"engine": engine.model_copy(update={"template": name})}),
            world_size,
            on_gpu=True,
        )
        for name in CHOSEN_FROM
    }
    return fitting(model, templates, [step for _, step in _steps(config, world_size)], limit_bytes)


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


def _steps(config: RunConfig, world_size: int) -> list[tuple[int, StepShape]]:
    """(upper edge, one rank's step) of every length bucket and group size."""
    is_text = config.objective.data_kind == "text"
    return [
        (step.max_tokens, _step(config, step, world_size))
        for group in sorted(set(group_sizes(config.data)))
        for step in queries_in_buckets(config.data, group, is_text)
    ]


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


def _step(config: RunConfig, step: BucketStep, world_size: int) -> StepShape:
    """One rank's share of a step, by the same numbers as the data plan serves."""
    # what fits a token budget need not divide over the ranks: one may get a query more than the mean
    queries = -(-step.queries // world_size)
    return StepShape(
        num_queries=queries if step.query_tokens else 0,
        num_passages=queries * (step.passages // step.queries),
        query_tokens=step.query_tokens,
        passage_tokens=step.passage_tokens,
        chunk_tokens=config.data.batch.chunk_tokens,
        loss_tiles=config.objective.tiling(),
    )


def _on(flag: bool) -> str:
    return "on" if flag else "off"


def _spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")


def describe_run(config: RunConfig, world_size: int, *, on_gpu: bool) -> tuple[list[str], int]:
    """The table for a run that starts, and its planned bytes; empty and 0 for encoders that are not
    counted."""
    encoder: dict[str, Any] = read_encoder_config(config.model.path)
    if encoder.get("model_type") not in counted_families():
        return [], 0
    model, strategy = read_model_shape(config), read_strategy(config, world_size, on_gpu=on_gpu)
    edge, step = heaviest_step(config, model, strategy)
    plan = plan_memory(model, strategy, step)
    return table(config, edge, step, strategy, plan), plan.total_bytes
