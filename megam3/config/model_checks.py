"""Rules about the model of a recipe: its folder, heads, adapters, and what of it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megam3.config.freezing import freeze_problems
from megam3.config.schema import RunConfig
from megam3.encoders import (
    HEAD_FILES,
    find_expansion_problem,
    find_packing_problem,
    read_encoder_config,
    usable_positions,
)
from megam3.errors import ConfigError
from megam3.reading import Reading, resolve_reading, turn_encoder
from megam3.token_layers import has_head

Problems = Iterator[ConfigError]


def model_folder(config: RunConfig) -> Problems:
    """The encoder's folder is there, runs packed, has the heads the stage needs and positions for every limit
    in use."""
    try:
        encoder = read_encoder_config(config.model.path)
    except ConfigError as error:
        yield error
        return
    encoder = turn_encoder(encoder, config.model.attention)
    problem = find_packing_problem(encoder, config.model.path)
    if problem is not None:
        yield problem
        return
    try:
        reading = resolve_reading(
            config.model.path,
            encoder,
            pooling=config.model.pooling,
            cls_every_tokens=config.model.cls_every_tokens,
            attention=config.model.attention,
        )
    except ConfigError as error:
        yield error
        return
    yield from head_files(config)
    yield from expansion(config, encoder)
    yield from freeze_problems(config.model.freeze, encoder.get("num_hidden_layers"))
    yield from something_to_train(config)
    yield from config.objective.encoder_problems(encoder)
    limits = {name: getattr(config.data, name) for name in ("query_max_tokens", "passage_max_tokens")}
    yield from position_rows(encoder, "data", limits, reading)
    if config.evaluation.folders:
        limits = {
            name: getattr(config.evaluation, name) for name in ("query_max_tokens", "passage_max_tokens")
        }
        yield from position_rows(encoder, "evaluation", limits, reading)


def head_files(config: RunConfig) -> Problems:
    """Heads that are not to be started from scratch are there; said now, not after an hour of tokenising."""
    if config.model.missing_heads == "init":
        return
    of_files = set(HEAD_FILES) - ({"lexical"} if config.model.lexical_kind == "expansion" else set())
    wanted = [head for head in config.objective.scored_heads() if head in of_files]
    missing = [HEAD_FILES[head] for head in wanted if not has_head(Path(config.model.path), head)]
    if missing:
        rule = f"head weights are missing ({', '.join(missing)})"
        remedy = "set model.missing_heads: init to start these heads from scratch"
        yield ConfigError("model.path", config.model.path, rule, remedy)


def projection(config: RunConfig) -> Problems:
    """A residual block belongs to a multi-vector head that is trained, and has an activation of its own."""
    hidden, activation = config.model.multi_vector_hidden, config.model.multi_vector_activation
    if hidden is not None and "multi_vector" not in config.objective.scored_heads():
        rule = "is a block of the multi-vector head, which this stage does not train"
        remedy = "leave it out, or add multi_vector to objective.heads"
        yield ConfigError("model.multi_vector_hidden", hidden, rule, remedy)
    if activation is not None and hidden is None:
        rule = "is the activation of the block that model.multi_vector_hidden makes"
        remedy = "leave it out, or set model.multi_vector_hidden"
        yield ConfigError("model.multi_vector_activation", activation, rule, remedy)


def adapters(config: RunConfig) -> Problems:
    """Low-rank adapters need their package, a stage that reads pairs, and an encoder not frozen whole."""
    lora = config.model.lora
    if lora is None:
        return
    if find_spec("peft") is None:
        remedy = "pip install 'megam3[lora]', or model.lora: null"
        yield ConfigError("model.lora", lora.rank, "needs the package peft, which is not installed", remedy)
    if config.objective.data_kind != "pair":
        rule = f"objective.kind={config.objective.kind} trains the whole encoder"
        yield ConfigError("model.lora", lora.rank, rule, "set model.lora: null")
    if "encoder" in config.model.freeze:
        rule = (
            "leaves the adapters of model.lora frozen too; without it they alone are trained in the encoder"
        )
        yield ConfigError("model.freeze", config.model.freeze, rule, "remove encoder, or model.lora")


def something_to_train(config: RunConfig) -> Problems:
    """A frozen encoder leaves the heads that have weights; the dense head has none."""
    heads = config.objective.scored_heads()
    if "encoder" in config.model.freeze and heads == ("dense",):
        rule = "leaves nothing to train: the dense head has no weights of its own"
        remedy = "freeze less, or add a head with weights to objective.heads"
        yield ConfigError("model.freeze", config.model.freeze, rule, remedy)
    for name, head in (("lexical_lr", "lexical"), ("multi_vector_lr", "multi_vector")):
        value = getattr(config.optim, name)
        if value is not None and head not in heads:
            rule = f"is the rate of the {head} head, which this stage does not train"
            yield ConfigError(f"optim.{name}", value, rule, "leave it out, or add the head")


def expansion(config: RunConfig, encoder: dict[str, Any]) -> Problems:
    """An expansion head needs a masked-LM head it can start from, and a lexical head that is trained."""
    if config.model.lexical_kind != "expansion":
        if config.model.expansion_top_k is not None and config.model.lexical_kind == "tokens":
            rule = "prunes an expansion head, and model.lexical_kind is tokens"
            remedy = "leave it out, or set model.lexical_kind: expansion"
            yield ConfigError("model.expansion_top_k", config.model.expansion_top_k, rule, remedy)
        return
    if "lexical" not in config.objective.scored_heads():
        rule = "is a kind of lexical head, which this stage does not train"
        yield ConfigError("model.lexical_kind", "expansion", rule, "add lexical to objective.heads")
    problem = find_expansion_problem(encoder)
    if problem is not None:
        yield problem


def position_rows(
    encoder: dict[str, Any], section: str, limits: dict[str, int], reading: Reading
) -> Problems:
    """No text is longer than the encoder's position table, with the tokens that `mcls` puts in."""
    rows = usable_positions(encoder)
    usable = None if rows is None else reading.usable_tokens(rows)
    for name, tokens in limits.items():
        if usable is not None and tokens > usable:
            rule = (
                f"the encoder has positions for {usable} tokens (max_position_embeddings"
                f" {encoder['max_position_embeddings']})"
            )
            remedy = f"lower it to {usable}, or give the encoder more with megam3 extend-positions"
            yield ConfigError(f"{section}.{name}", tokens, rule, remedy)
