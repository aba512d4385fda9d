"""Rules that join several fields, or a field and the disk. No device is touched and no weight is read.

Each rule is a small function that yields the ConfigErrors it finds; `check_config` runs them all and reports
everything at once.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megam3.config.batch_size import bucket_table, edge_problems, size_problems
from megam3.config.schema import DataConfig, EvaluationConfig, OptimConfig, RunConfig, TrainConfig
from megam3.encoders import HEAD_FILES, find_packing_problem, read_encoder_config, usable_positions
from megam3.errors import ConfigError, raise_all

MAX_NAME_BYTES = 200
"""File systems end names at 255 bytes; what is left is for the suffixes of files written aside."""
MIN_TEXT_TOKENS = 3
"""The two special tokens and one of the text."""

Problems = Iterator[ConfigError]


def check_config(config: RunConfig, world_size: int, *, files: bool = True) -> None:
    """Check every rule for a run on `world_size` ranks; `files=False` leaves out what needs the disk.

    Raises:
        ConfigError: a rule is broken; `GroupedConfigError` for several.
    """
    problems = [
        *run_name(config.name),
        *size_problems(config.data),
        *batch_limits(config.data, world_size),
        *world_size_divides(config.data, world_size),
        *text_limits(config.data),
        *edge_problems(config.data),
        *datasets(config.data),
        *run_length(config.train, config.evaluation),
        *activation_offload(config),
        *optimizer(config.optim),
        *config.objective.problems(),
        *evaluation_needs_ranking(config),
    ]
    if files:
        problems += [*data_files(config.data), *evaluation_folders(config.evaluation), *model_folder(config)]
    raise_all(problems)


def run_name(name: str) -> Problems:
    """The run folder lies directly in output_dir: its name is one part of a path."""
    remedy = "use letters, digits, - and _; output_dir says where run folders are made"
    shown = name if len(name) <= MAX_NAME_BYTES else f"{name[:40]}…"
    if not name.strip() or name in (".", ".."):
        yield ConfigError("name", shown, "names no folder of its own in output_dir", remedy)
    elif not name.isprintable() or "/" in name or "\\" in name:
        rule = "must be one folder name, without slashes and control characters"
        yield ConfigError("name", shown, rule, remedy)
    elif len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        yield ConfigError("name", shown, f"must have at most {MAX_NAME_BYTES} bytes", remedy)


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


def evaluation_needs_ranking(config: RunConfig) -> Problems:
    """Only a stage whose model ranks passages can be evaluated on test sets."""
    if config.evaluation.folders and not config.objective.can_evaluate:
        rule = f"the model of objective.kind={config.objective.kind} ranks no passages"
        yield ConfigError(
            "evaluation.folders", config.evaluation.folders, rule, "leave it empty in this stage"
        )


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
    """The encoder's folder is there, runs packed, has the heads the stage needs and positions for every limit
    in use."""
    try:
        encoder = read_encoder_config(config.model.path)
    except ConfigError as error:
        yield error
        return
    problem = find_packing_problem(encoder, config.model.path)
    if problem is not None:
        yield problem
        return
    yield from head_files(config)
    yield from config.objective.encoder_problems(encoder)
    limits = {name: getattr(config.data, name) for name in ("query_max_tokens", "passage_max_tokens")}
    yield from position_rows(encoder, "data", limits)
    if config.evaluation.folders:
        limits = {
            name: getattr(config.evaluation, name) for name in ("query_max_tokens", "passage_max_tokens")
        }
        yield from position_rows(encoder, "evaluation", limits)


def head_files(config: RunConfig) -> Problems:
    """Heads that are not to be started from scratch are there; said now, not after an hour of tokenising."""
    if config.model.missing_heads == "init":
        return
    wanted = [HEAD_FILES[head] for head in config.objective.scored_heads() if head in HEAD_FILES]
    missing = [name for name in wanted if not (Path(config.model.path) / name).is_file()]
    if missing:
        rule = f"head weights are missing ({', '.join(missing)})"
        remedy = "set model.missing_heads: init to start these heads from scratch"
        yield ConfigError("model.path", config.model.path, rule, remedy)


def position_rows(encoder: dict[str, Any], section: str, limits: dict[str, int]) -> Problems:
    """No text is longer than the encoder's position table."""
    usable = usable_positions(encoder)
    for name, tokens in limits.items():
        if usable is not None and tokens > usable:
            rule = (
                f"the encoder has positions for {usable} tokens (max_position_embeddings"
                f" {encoder['max_position_embeddings']})"
            )
            remedy = f"lower it to {usable}, or give the encoder more with megam3 extend-positions"
            yield ConfigError(f"{section}.{name}", tokens, rule, remedy)
