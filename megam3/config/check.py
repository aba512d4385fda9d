"""Rules that join several fields, or a field and the disk. No device is touched and no weight is read.

Each rule is a small function that yields the ConfigErrors it finds; `check_config` runs them all and reports everything at once.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megam3.config.batch_size import bucket_table, edge_problems, size_problems
from megam3.config.problems import raise_problems
from megam3.config.schema import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from megam3.errors import ConfigError

MIN_TEXT_TOKENS = 3
"""The two special tokens and one of the text."""

ROW_OFFSET_MODELS = frozenset(
    {"xlm-roberta", "xlm-roberta-xl", "roberta", "camembert", "xmod", "data2vec-text"}
)
"""Encoders of the RoBERTa family: position rows start at pad_token_id + 1, so that many rows hold no position."""

Problems = Iterator[ConfigError]


def check_config(config: RunConfig, world_size: int, *, files: bool = True) -> None:
    """Check every rule for a run on `world_size` ranks; `files=False` leaves out what needs the disk.

    Raises:
        ConfigError: a rule is broken; `GroupedConfigError` for several.
    """
    problems = [
        *size_problems(config.data),
        *batch_limits(config.data, world_size),
        *world_size_divides(config.data, world_size),
        *text_limits(config.data),
        *edge_problems(config.data),
        *datasets(config.data),
        *run_length(config.train, config.evaluation),
        *activation_offload(config),
        *optimizer(config.optim),
        *loss_weights(config),
    ]
    if files:
        problems += [*data_files(config.data), *evaluation_folders(config.evaluation), *model_folder(config)]
    raise_problems(problems)


def world_size_divides(data: DataConfig, world_size: int) -> Problems:
    """Every rank gets the same number of queries."""
    table = bucket_table(data.batch)
    sizes = [("data.batch.global_queries", data.batch.global_queries)] if data.batch.global_queries else []
    sizes += [
        (f"data.batch.buckets up to {row.max_tokens} tokens", row.global_queries) for row in table or ()
    ]
    for field, queries in sizes:
        if queries % world_size:
            down = queries // world_size * world_size
            near = f"{down} or {down + world_size}" if down else f"{world_size}"
            rule = f"{world_size} ranks must share the queries of a step equally"
            yield ConfigError(field, queries, rule, f"use {near}, or another number of ranks")


def text_limits(data: DataConfig) -> Problems:
    """A limit leaves room for the special tokens and at least one more."""
    for name in ("query_max_tokens", "passage_max_tokens"):
        value = getattr(data, name)
        if value < MIN_TEXT_TOKENS:
            rule = "two of the tokens are special, so nothing of the text would be left"
            yield ConfigError(f"data.{name}", value, rule, f"use at least {MIN_TEXT_TOKENS}")


def batch_limits(data: DataConfig, world_size: int) -> Problems:
    """Chunks and token budgets hold the longest text they may have to."""
    longest = max(data.query_max_tokens, data.passage_max_tokens)
    chunk, budget = data.batch.chunk_tokens, data.batch.global_tokens
    if chunk is not None and chunk < longest:
        rule = f"one text can have {longest} tokens and is never split"
        yield ConfigError(
            "data.batch.chunk_tokens",
            chunk,
            rule,
            f"use at least {longest}, or lower data.passage_max_tokens",
        )
    pair = data.query_max_tokens + data.passage_max_tokens
    if budget is not None and budget < pair * world_size:
        rule = f"{world_size} ranks must each hold a query and a passage, {pair} tokens at their limits"
        yield ConfigError(
            "data.batch.global_tokens",
            budget,
            rule,
            f"use at least {pair * world_size}, or lower the limits of texts",
        )


def datasets(data: DataConfig) -> Problems:
    """Names are unique, and a group without in-batch negatives has negatives of its own."""
    names = [dataset.name for dataset in data.train]
    for index, dataset in enumerate(data.train):
        if dataset.name in names[:index]:
            field = f"data.train.{index}.name"
            yield ConfigError(
                field,
                dataset.name,
                f"dataset {names.index(dataset.name)} has this name too",
                "give each its own name",
            )
        if not dataset.in_batch_negatives and (dataset.passages_per_query or data.passages_per_query) < 2:
            rule = "without in-batch negatives, a group of one passage has nothing to be told apart from"
            yield ConfigError(
                f"data.train.{index}.passages_per_query",
                1,
                rule,
                "use at least 2, or in_batch_negatives: true",
            )


def run_length(train: TrainConfig, evaluation: EvaluationConfig) -> Problems:
    """Exactly one of steps and epochs; evaluating needs something to evaluate on."""
    rule = "exactly one of steps and epochs says how long a run is"
    if train.steps is None and train.epochs is None:
        yield ConfigError("train", None, rule, "set one, for example train.epochs=1")
    if train.steps is not None and train.epochs is not None:
        given = {"steps": train.steps, "epochs": train.epochs}
        yield ConfigError(
            "train", given, rule, "keep one and set the other to null, for example train.epochs=null"
        )
    if train.evaluate_every_steps is not None and not evaluation.folders:
        yield ConfigError(
            "train.evaluate_every_steps",
            train.evaluate_every_steps,
            "there is no test set to evaluate on",
            "name BEIR folders in evaluation.folders, or set it to null",
        )


def activation_offload(config: RunConfig) -> Problems:
    """What is offloaded are the checkpointed layer inputs."""
    engine = config.engine
    if engine.activation_offload and not engine.activation_checkpointing:
        rule = "it moves the inputs that activation checkpointing keeps, and checkpointing is off"
        yield ConfigError(
            "engine.activation_offload", True, rule, "set engine.activation_checkpointing=true too"
        )


def optimizer(optim: OptimConfig) -> Problems:
    """AdamW's decays lie in [0, 1)."""
    for index, beta in enumerate(optim.betas):
        if not 0 <= beta < 1:
            yield ConfigError(
                f"optim.betas.{index}",
                beta,
                "must be at least 0 and below 1",
                "the usual pair is [0.9, 0.999]",
            )


def loss_weights(config: RunConfig) -> Problems:
    """Something must be trained."""
    for name in ("sum_weights", "loss_weights", "distill_weights"):
        weights = getattr(config.objective, name)
        if weights is not None and not any(weights.model_dump().values()):
            rule = "all weights are 0"
            remedy = (
                "set one above 0, or self_distill: false"
                if name == "distill_weights"
                else "set one above 0, or null for the preset's"
            )
            yield ConfigError(f"objective.{name}", weights.model_dump(), rule, remedy)


def data_files(data: DataConfig) -> Problems:
    """Every path of every dataset leads to something."""
    for number, dataset in enumerate(data.train):
        for index, path in enumerate(dataset.paths):
            field = f"data.train.{number}.paths.{index}"
            if Path(path).is_dir():
                if not any(Path(path).iterdir()):
                    yield ConfigError(
                        field, path, "the folder is empty", "put data files there, or correct the path"
                    )
            elif not Path(path).is_file() and not glob.glob(path, recursive=True):
                is_pattern = glob.has_magic(path)
                rule = "no file matches" if is_pattern else "no such file or folder"
                here = "" if Path(path).is_absolute() else f"; relative paths start at {Path.cwd()}"
                yield ConfigError(field, path, rule, f"correct the path{here}")


def evaluation_folders(evaluation: EvaluationConfig) -> Problems:
    """Each test set has the three parts of the BEIR format."""
    for index, folder in enumerate(evaluation.folders):
        parts = ("corpus.jsonl", "queries.jsonl", f"qrels/{evaluation.split}.tsv")
        missing = [part for part in parts if not (Path(folder) / part).is_file()]
        if missing:
            rule = f"not a BEIR folder: it lacks {', '.join(missing)}"
            yield ConfigError(
                f"evaluation.folders.{index}", folder, rule, "correct the path, or evaluation.split"
            )


def model_folder(config: RunConfig) -> Problems:
    """The encoder's folder is there, and its position table is long enough for every limit in use."""
    try:
        encoder = read_encoder_config(config.model)
    except ConfigError as error:
        yield error
        return
    limits = {name: getattr(config.data, name) for name in ("query_max_tokens", "passage_max_tokens")}
    yield from position_rows(encoder, "data", limits)
    if config.evaluation.folders:
        limits = {
            name: getattr(config.evaluation, name) for name in ("query_max_tokens", "passage_max_tokens")
        }
        yield from position_rows(encoder, "evaluation", limits)


def read_encoder_config(model: ModelConfig) -> dict[str, Any]:
    """`config.json` of the encoder's folder.

    Raises:
        ConfigError: no folder, no config.json, or not a JSON object.
    """
    folder = Path(model.path)
    if not folder.is_dir():
        remedy = "give a local Hugging Face folder; a model of a hub has to be downloaded first"
        raise ConfigError("model.path", model.path, "no such folder", remedy)
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            "model.path", model.path, "holds no config.json", "give the folder that `save_pretrained` wrote"
        )
    try:
        encoder = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            str(path), str(error), "is not readable JSON", "restore the file from the model's source"
        ) from None
    if not isinstance(encoder, dict):
        raise ConfigError(
            str(path),
            type(encoder).__name__,
            "must hold a JSON object",
            "restore the file from the model's source",
        )
    return encoder


def usable_positions(encoder: dict[str, Any]) -> int | None:
    """Tokens the longest text may have, from a config.json; None when it does not say.

    >>> usable_positions({"model_type": "xlm-roberta", "max_position_embeddings": 8194, "pad_token_id": 1})
    8192
    """
    rows = encoder.get("max_position_embeddings")
    if not isinstance(rows, int):
        return None
    if encoder.get("model_type") in ROW_OFFSET_MODELS:
        pad = encoder.get("pad_token_id")
        return rows - (pad if isinstance(pad, int) else 1) - 1
    return rows


def position_rows(encoder: dict[str, Any], section: str, limits: dict[str, int]) -> Problems:
    """No text is longer than the encoder's position table."""
    usable = usable_positions(encoder)
    for name, tokens in limits.items():
        if usable is not None and tokens > usable:
            rule = f"the encoder has positions for {usable} tokens (max_position_embeddings {encoder['max_position_embeddings']})"
            remedy = f"lower it to {usable}, or give the encoder more with tools/extend_positions.py"
            yield ConfigError(f"{section}.{name}", tokens, rule, remedy)
