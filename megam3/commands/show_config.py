"""`megam3 show-config RECIPE [key=value…]`: what a run would be, without starting it or touching a device."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pydantic import BaseModel

from megam3.commands.recipe import add_recipe, given_config
from megam3.config.batch_size import BatchRow, batch_arithmetic, edge_problems, size_problems
from megam3.config.check import check_config
from megam3.config.deepspeed import build_deepspeed_config
from megam3.config.load import RECIPE_DIR, dump_config, find_recipe, load_config, recipe_names
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import RunConfig
from megam3.errors import ConfigError, GroupedConfigError, raise_all
from megam3.loss.settings import resolve_settings
from megam3.model.hub import with_local_model
from megam3.planning.choice import Choice, chosen, is_auto, visible_gpu_bytes
from megam3.planning.recipe import stored_lengths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megam3 show-config", description=__doc__)
    add_recipe(parser, required=False)
    parser.add_argument("--list", action="store_true", help="list the packaged recipes")
    parser.add_argument(
        "--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", "1")), help="ranks (default: 1)"
    )
    parser.add_argument(
        "--gpu", action="store_true", help="show what `engine.precision: auto` becomes on GPUs"
    )
    parser.add_argument("--no-files", action="store_true", help="do not check that data and model are there")
    parser.add_argument(
        "--json",
        action="store_true",
        help="recipe, batch, weights and DeepSpeed's dictionary as one document",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the resolved recipe, the batch arithmetic and the DeepSpeed dictionary as one YAML document with
    comments.

    Raises:
        ConfigError: whatever would stop the run before its first step.
    """
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.world_size < 1:
        parser.error("--world-size must be at least 1")
    if arguments.list:
        print("\n".join(recipe_names()))
        return 0
    if arguments.recipe is None:
        parser.error(f"a recipe is required: a YAML file, or one of {', '.join(recipe_names())}")
    config = given_config(arguments)
    # shown first: whoever has a problem with a recipe wants to see the recipe
    choice = _choice(config, arguments.world_size, on_gpu=arguments.gpu)
    config = config if choice is None else choice.config
    if arguments.json:
        facts = facts_of(config, arguments.world_size, has_gpu=arguments.gpu)
        facts["engine_choice"] = None if choice is None else choice.record
        print(json.dumps(facts, indent=2, ensure_ascii=False), flush=True)
    else:
        print(describe(config, arguments.world_size, has_gpu=arguments.gpu), flush=True)
        for line in () if choice is None else choice.lines:
            print(f"# {line}", flush=True)
    problems = _problems(config, arguments.world_size, files=not arguments.no_files)
    missing = left_to_the_user(arguments.recipe, problems)
    if not missing:
        raise_all(problems)
    if not arguments.json:
        print("".join(f"# {line}".rstrip() + "\n" for line in missing), end="", flush=True)
    return 0


def _choice(config: RunConfig, world_size: int, *, on_gpu: bool) -> Choice | None:
    """What `engine.template: auto` becomes; None without it, or where batches cannot be counted."""
    if not is_auto(config) or any(size_problems(config.data)) or any(edge_problems(config.data)):
        return None
    memory_bytes = visible_gpu_bytes() if on_gpu else None
    return chosen(config, world_size, memory_bytes, on_gpu=on_gpu, longest=stored_lengths(config))


def facts_of(config: RunConfig, world_size: int, *, has_gpu: bool) -> dict[str, Any]:
    """As `describe`, for programs."""
    return {
        "recipe": config.model_dump(mode="json"),
        "ranks": world_size,
        "batch": [asdict(row) for row in batch_arithmetic(config.data, world_size)],
        "weights": {
            name: None if weights is None else weights.model_dump()
            for name, weights in _weights(config).items()
        },
        "deepspeed": build_deepspeed_config(config, world_size, has_gpu=has_gpu),
    }


def _problems(config: RunConfig, world_size: int, *, files: bool) -> list[ConfigError]:
    """Whatever would stop the run before its first step."""
    found: list[ConfigError] = []
    try:
        config = with_local_model(config, weights=False) if files else config
    except ConfigError as error:
        found.append(error)
    try:
        check_config(config, world_size, files=files)
    except ConfigError as error:
        each = error.problems if isinstance(error, GroupedConfigError) else (error,)
        # of a model that cannot be had, what the hub said says more
        found += [problem for problem in each if not (found and problem.value == config.model.path)]
    return found


def left_to_the_user(recipe: str, problems: Sequence[ConfigError]) -> list[str]:
    """What a packaged recipe cannot know, where there are no other problems: the paths that stand in it for
    the reader's own. Empty otherwise."""
    if not problems or find_recipe(recipe).parent != RECIPE_DIR:
        return []
    own = load_config(recipe)
    stand_ins = {own.model.path, *own.evaluation.folders, *(p for each in own.data.train for p in each.paths)}
    if not all(problem.value in stand_ins and problem.rule.startswith("no ") for problem in problems):
        return []
    fields = ["model.path" if problem.value == own.model.path else problem.what for problem in problems]
    width = max(map(len, fields))
    lines = [f"  {name:<{width}}  now {each.value}" for name, each in zip(fields, problems, strict=True)]
    return ["", "To train it, say where these are, in a copy of the recipe or as key=value:", *lines]


def describe(config: RunConfig, world_size: int, *, has_gpu: bool) -> str:
    """The resolved recipe as YAML, then, in comments, a table of the batch and the DeepSpeed dictionary."""
    deepspeed = json.dumps(build_deepspeed_config(config, world_size, has_gpu=has_gpu), indent=2)
    ranks = f"{world_size} rank{'s' if world_size > 1 else ''}"
    table = [f"One step on {ranks}:", *batch_table(batch_arithmetic(config.data, world_size))]
    comments = [
        *table,
        "",
        *loss_lines(config),
        f"DeepSpeed ({config.engine.template}):",
        *deepspeed.splitlines(),
    ]
    return dump_config(config) + "\n" + "\n".join(f"# {line}".rstrip() for line in comments)


def loss_lines(config: RunConfig) -> list[str]:
    """The weights that training uses, presets resolved, absent heads at 0; none for other stages."""
    if not isinstance(config.objective, UnifiedConfig):
        return []
    tables = _weights(config)
    lines = [f"Weights (preset {config.objective.preset}):"]
    for name, table in tables.items():
        numbers = "off" if table is None else "  ".join(f"{k} {v:g}" for k, v in table.model_dump().items())
        lines.append(f"  {name:<17}  {numbers}")
    return [*lines, ""]


def _weights(config: RunConfig) -> dict[str, BaseModel | None]:
    """Tables of weights by what they weigh; None where it is off, and no table for other stages."""
    if not isinstance(config.objective, UnifiedConfig):
        return {}
    settings = resolve_settings(config.objective)
    return {
        "losses": settings.loss_weights,
        "combined score": settings.sum_weights,
        "self-distillation": settings.distill_weights,
    }


def batch_table(rows: Sequence[BatchRow]) -> list[str]:
    """Aligned lines, one per length bucket, under a heading."""
    heading = ("up to tokens", "queries", "a rank", "passages a rank", "tokens a rank", "chunks")
    cells = [heading] + [
        tuple(f"{value:,}".replace(",", " ") if value is not None else "budget" for value in _values(row))
        for row in rows
    ]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heading))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]


def _values(row: BatchRow) -> tuple[int | None, ...]:
    return (
        row.max_tokens,
        row.global_queries,
        row.queries_per_rank,
        row.passages_per_rank,
        row.max_tokens_per_rank,
        row.chunks_per_rank,
    )
