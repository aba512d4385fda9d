"""Rules that join several fields, or a field and the disk. No device is touched and no weight is read.

Each rule is a small function that yields the ConfigErrors it finds; `check_config` runs them all and reports
everything at once.
"""

from __future__ import annotations

import glob
import os
from pathlib import Path

from megam3.config.batch_size import bucket_table, edge_problems, size_problems
from megam3.config.model_checks import Problems, adapters, model_folder, projection
from megam3.config.schema import MODE_HEADS, DataConfig, EvaluationConfig, OptimConfig, RunConfig, TrainConfig
from megam3.errors import ConfigError, raise_all
from megam3.files import folder_name

MAX_NAME_BYTES = 200
"""File systems end names at 255 bytes; what is left is for the suffixes of files written aside."""
MIN_TEXT_TOKENS = 3
"""The two special tokens and one of the text."""


def check_config(config: RunConfig, world_size: int, *, files: bool = True) -> None:
    """Check every rule for a run on `world_size` ranks; `files=False` leaves out what needs the disk.

    Raises:
        ConfigError: a rule is broken; `GroupedConfigError` for several.
    """
    problems = [
        *run_name(config.name),
        *run_folder(config),
        *size_problems(config.data),
        *batch_limits(config.data, world_size),
        *world_size_divides(config.data, world_size),
        *text_limits(config.data),
        *edge_problems(config.data),
        *datasets(config.data),
        *run_length(config.train, config.evaluation),
        *evaluated_figures(config),
        *activation_offload(config),
        *compiled_layers(config),
        *optimizer(config.optim),
        *config.objective.problems(),
        *evaluation_needs_ranking(config),
        *several_positives(config),
        *projection(config),
        *adapters(config),
    ]
    if files:
        problems += [
            *output_folder(config),
            *data_files(config.data),
            *evaluation_folders(config.evaluation),
            *model_folder(config),
        ]
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


def run_folder(config: RunConfig) -> Problems:
    """A run continues: DeepSpeed looks for the files of a checkpoint by a pattern that begins with their
    folder."""
    folder = str(Path(config.run_dir).absolute())
    found = [character for character in "*?[" if character in folder]
    if found:
        rule = f"leads to a folder with {' '.join(found)} in its path, which DeepSpeed reads as a pattern"
        yield ConfigError("output_dir", folder, rule, "name a folder without * ? and [")


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
        if data.batch.global_queries == 1 and (dataset.passages_per_query or data.passages_per_query) < 2:
            yield ConfigError(
                "data.batch.global_queries",
                1,
                f"one query and its one passage ({dataset.name}) are told apart from nothing: the loss is 0",
                "use at least 2, or passages_per_query of at least 2 with negatives in the records",
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


def compiled_layers(config: RunConfig) -> Problems:
    """Attention by runs depends on every length of a batch: layers would be compiled for each batch anew."""
    if config.engine.compile_layers and config.engine.attention == "sdpa":
        rule = "needs the varlen kernel: with engine.attention=sdpa each batch would be compiled for anew"
        remedy = "set engine.attention=auto, or engine.compile_layers=false"
        yield ConfigError("engine.compile_layers", True, rule, remedy)


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


def evaluated_figures(config: RunConfig) -> Problems:
    """Whatever follows a figure of the evaluation needs evaluations, in a mode whose heads are trained."""
    train, evaluation = config.train, config.evaluation
    for field in ("keep_best", "early_stopping"):
        followed = getattr(train, field)
        if followed is None:
            continue
        if not (evaluation.folders and train.evaluate_every_steps):
            rule = "follows a figure of the evaluation, and there is none during this run"
            remedy = "set train.evaluate_every_steps and evaluation.folders, or leave it out"
            yield ConfigError(f"train.{field}", followed.metric, rule, remedy)
        elif config.objective.can_evaluate:
            heads = {"dense", *config.objective.scored_heads()}
            missing = [head for head in MODE_HEADS[followed.mode] if head not in heads]
            if missing:
                rule = f"needs the heads {', '.join(missing)}, which this stage does not train"
                offered = [mode for mode, needed in MODE_HEADS.items() if heads.issuperset(needed)]
                remedy = f"follow one of {', '.join(offered)}"
                yield ConfigError(f"train.{field}.mode", followed.mode, rule, remedy)


def evaluation_needs_ranking(config: RunConfig) -> Problems:
    """Only a stage whose model ranks passages can be evaluated on test sets."""
    if config.evaluation.folders and not config.objective.can_evaluate:
        rule = f"the model of objective.kind={config.objective.kind} ranks no passages"
        yield ConfigError(
            "evaluation.folders", config.evaluation.folders, rule, "leave it empty in this stage"
        )


def output_folder(config: RunConfig) -> Problems:
    """No part of the run folder's path is a file."""
    for place in (config.run_dir, *config.run_dir.parents):
        if os.path.isfile(place):  # False, and no error, where it may not be looked at
            field = "name" if place == config.run_dir else "output_dir"
            rule = f"{place} is a file, and the run wants a folder there"
            yield ConfigError(field, getattr(config, field), rule, "name a folder, or remove the file")


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
    """Each test set has the three parts of the BEIR format, and a name of its own."""
    names = [folder_name(folder) for folder in evaluation.folders]
    for index, folder in enumerate(evaluation.folders):
        parts = ("corpus.jsonl", "queries.jsonl", f"qrels/{evaluation.split}.tsv")
        missing = [part for part in parts if not (Path(folder) / part).is_file()]
        if missing:
            rule = f"not a BEIR folder: it lacks {', '.join(missing)}"
            yield ConfigError(
                f"evaluation.folders.{index}", folder, rule, "correct the path, or evaluation.split"
            )
        if names[index] in names[:index]:
            # figures and files would be those of the last one alone, and so would train.keep_best
            rule = f"another test set is called {names[index]!r}, too, and results are filed by name"
            yield ConfigError(f"evaluation.folders.{index}", folder, rule, "rename one of the folders")


def several_positives(config: RunConfig) -> Problems:
    """Texts for pretraining have no positives to draw."""
    wanted = config.data.positives_per_query
    if wanted > 1 and config.objective.data_kind != "pair":
        rule = f"objective.kind={config.objective.kind} reads texts, which have no positives"
        yield ConfigError("data.positives_per_query", wanted, rule, "leave it at 1")
