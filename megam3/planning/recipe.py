"""What the memory plan counts with, read from a recipe and the encoder's config.json: sizes of the model, the
strategy, and the step of every length bucket. No weights are read, no device is touched; of a store, where
there is one, how long its texts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megam3.config.batch_size import BucketStep, group_sizes, queries_in_buckets
from megam3.config.deepspeed import build_deepspeed_config, is_half
from megam3.config.freezing import layer_range
from megam3.config.head_layers import find_layers
from megam3.config.schema import ModelConfig, RunConfig
from megam3.data.lengths import LongestTexts, longest_texts
from megam3.encoders import FAMILIES, EncoderFamily, counted_families, read_encoder_config, read_shape
from megam3.errors import ConfigError
from megam3.files import read_json
from megam3.planning.memory import plan_memory
from megam3.planning.shapes import ModelShape, StepShape, Strategy
from megam3.reading import OWN_FILE
from megam3.token_layers import read_token_layers

DEFAULT_BUCKET, DEFAULT_LIVE = 500_000_000, 1_000_000_000
"""DeepSpeed's own reduce_bucket_size and stage3_max_live_parameters, where a template is silent."""


def read_model_shape(config: RunConfig) -> ModelShape:
    """Sizes from the encoder's config.json and the recipe.

    Raises:
        ConfigError: no readable config.json, or a family whose layers are not counted.
        CheckpointError: see `find_layers`.
    """
    encoder, model = read_encoder_config(config.model.path), config.model
    family = encoder.get("model_type")
    if family not in counted_families():
        rule = "is an encoder whose activations this command has not counted"
        remedy = f"use one of: {', '.join(counted_families())}"
        raise ConfigError("model.path", f"{model.path} ({family})", rule, remedy)
    field = FAMILIES[family].direction_field
    if field and model.attention is not None:
        encoder = {**encoder, field: (model.attention == "causal") == (field == "is_causal")}
    return ModelShape(
        **_sizes(encoder, model.path),
        **_attention(encoder),
        **_biases(FAMILIES[family], encoder),
        hidden_dropout=_dropout(encoder, model.hidden_dropout, "hidden_dropout_prob", "mlp_dropout"),
        attention_dropout=_dropout(
            encoder, model.attention_dropout, "attention_probs_dropout_prob", "attention_dropout"
        ),
        **_stage(config),
        **_multi_vector(config, encoder["hidden_size"]),
        **_training(model),
    )


def _sizes(encoder: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What must stand in config.json.

    Raises:
        ConfigError: a size that is no number.
    """

    def size(key: str) -> int:
        value = encoder.get(key)
        if not isinstance(value, int):
            remedy = "use the encoder's own config.json"
            raise ConfigError(f"{source}/config.json: {key}", value, "must be a number", remedy)
        return value

    # transformers' defaults where a config is silent
    types = 1 if encoder["model_type"] == "xlm-roberta-xl" else 2
    return {
        "num_layers": size("num_hidden_layers"),
        "hidden_size": size("hidden_size"),
        "intermediate_size": size("intermediate_size"),
        "num_attention_heads": size("num_attention_heads"),
        "vocab_size": size("vocab_size"),
        "num_positions": size("max_position_embeddings"),
        "num_types": int(encoder.get("type_vocab_size", types)),
        "embedding_size": int(encoder.get("embedding_size") or 0),
    }


def _attention(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Kind of layer, widths of its heads, windows and direction."""
    family, shape = FAMILIES[str(encoder["model_type"])], read_shape(encoder)
    return {
        "layer": family.layer,
        "norms_heads": family.norms_heads,
        "query_width": shape.query_width or 0,
        "key_width": shape.key_width or 0,
        "num_windowed_layers": shape.num_windowed_layers,
        "window_reach": shape.window_reach,
        "is_causal": shape.is_causal,
    }


def _stage(config: RunConfig) -> dict[str, Any]:
    """What the objective puts on the encoder."""
    section, kind, own = config.objective, config.model.lexical_kind, Path(config.model.path) / OWN_FILE
    if kind is None and own.is_file():
        kind = read_json(own).get("lexical_kind")
    return {
        "heads": section.scored_heads(),
        "num_dimensions": section.num_dimensions(),
        "predictions_per_token": section.predictions_per_token(),
        "has_decoder": section.has_decoder(),
        "has_bag_of_words": section.has_bag_of_words(),
        "expands": kind == "expansion" and "lexical" in section.scored_heads(),
    }


def _multi_vector(config: RunConfig, hidden_size: int) -> dict[str, Any]:
    """Width and layers of the multi-vector head: the recipe's, else the folder's."""
    if "multi_vector" not in config.objective.scored_heads():
        return {}
    folder = Path(config.model.path)
    width = config.model.multi_vector_dim or _folder_width(folder)
    return {
        "multi_vector_dim": width or 0,
        "multi_vector_layers": find_layers(folder, config.model, hidden_size, width),
    }


def _folder_width(folder: Path) -> int | None:
    """C as the folder's small files say it; None where they do not (of a published `colbert_linear.pt` alone
    the encoder's width is assumed)."""
    layers = tuple(read_token_layers(folder).values())
    if layers:
        return layers[-1].out_features
    own = folder / OWN_FILE
    return read_json(own).get("multi_vector_dim") if own.is_file() else None


def _biases(family: EncoderFamily, encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Which linear layers and norms have one."""
    named = {field: bool(encoder.get(field)) for field in family.biases}
    every = "all" in family.biases
    return {
        "qkv_bias": every or "qkv" in family.biases or named.get("attention_bias", False),
        "output_bias": every or named.get("attention_bias", False),
        "mlp_bias": every or named.get("mlp_bias", False),
        "norm_bias": every or named.get("norm_bias", False),
    }


def _dropout(encoder: Mapping[str, Any], override: float | None, *keys: str) -> float:
    """The recipe's probability, else the encoder's under the name its family uses."""
    if override is not None:
        return override
    return next((float(encoder[key] or 0.0) for key in keys if key in encoder), 0.0)


def _training(model: ModelConfig) -> dict[str, Any]:
    """What is trained of the encoder: `model.freeze` and `model.lora`."""
    spans = [span for part in model.freeze if (span := layer_range(part)) is not None]
    lora = model.lora
    return {
        "frozen": tuple(part for part in model.freeze if layer_range(part) is None),
        "frozen_layers": frozenset(n for first, last in spans for n in range(first, last + 1)),
        "lora_rank": 0 if lora is None else lora.rank,
        "lora_targets": None if lora is None or lora.target_modules is None else tuple(lora.target_modules),
    }


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
        precision_bytes=2 if is_half(final) else 4,
        checkpointing=config.engine.activation_checkpointing,
        activation_offload=config.engine.activation_offload,
        optimizer_offload=offloads("offload_optimizer"),
        parameter_offload=offloads("offload_param"),
        bucket_elements=zero.get("reduce_bucket_size", DEFAULT_BUCKET) * copies,
        live_parameters=zero.get("stage3_max_live_parameters", DEFAULT_LIVE),
        on_gpu=on_gpu,
        reduces_once=config.engine.gradient_reduction == "once",
    )


def heaviest_step(
    config: RunConfig, model: ModelShape, strategy: Strategy, longest: LongestTexts | None = None
) -> tuple[int, StepShape]:
    """The length bucket (its longest text) whose step needs most, when every text is as long as it can be.

    Every group size of the recipe is tried: with a token budget, small groups make more queries of fewer
    passages.
    """
    return max(
        steps_of(config, strategy.world_size, longest),
        key=lambda step: plan_memory(model, strategy, step[1]).total_bytes,
    )


def strategies(
    config: RunConfig, names: Sequence[str], world_size: int, *, on_gpu: bool
) -> dict[str, Strategy]:
    """What this recipe makes of each template of ds_configs/, gradients reduced after every pass."""

    def with_template(name: str) -> RunConfig:
        change = {"template": name, "gradient_reduction": "every_pass"}
        return config.model_copy(update={"engine": config.engine.model_copy(update=change)})

    return {name: read_strategy(with_template(name), world_size, on_gpu=on_gpu) for name in names}


def stored_lengths(config: RunConfig) -> LongestTexts | None:
    """Of the recipe's store, where it is there: texts are seldom as long as the limits allow."""
    return longest_texts(config.store_dir, [dataset.name for dataset in config.data.train])


def steps_of(
    config: RunConfig, world_size: int, longest: LongestTexts | None = None
) -> list[tuple[int, StepShape]]:
    """(longest text, one rank's step) of every length bucket and group size; with the `longest` texts of a
    store, of the buckets that hold any, and no text longer than those."""
    is_text, found = config.objective.data_kind == "text", []
    for group in sorted(set(group_sizes(config.data))):
        below = 0
        for step in queries_in_buckets(config.data, group, is_text):
            edge, below, first = step.max_tokens, step.max_tokens, below
            if longest is not None and longest.text_tokens <= first:
                break
            text_tokens = edge if longest is None else _longest_packed(config, longest, edge)
            query_tokens = min(step.query_tokens, text_tokens)
            if longest is not None:
                query_tokens = min(query_tokens, longest.query_tokens)
            step = replace(
                step, query_tokens=query_tokens, passage_tokens=min(step.passage_tokens, text_tokens)
            )
            found.append((text_tokens, _step(config, step, world_size)))
    return found


def _longest_packed(config: RunConfig, longest: LongestTexts, edge: int) -> int:
    """Tokens of the longest sequence of a bucket: a text, or several that pretraining joins."""
    joined = config.data.pack_texts_tokens or 0
    return min(edge, max(longest.text_tokens, joined))


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
