"""`megam3 show-config RECIPE [key=value…]`: what a run would be, without starting it or touching a device."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

from megam3.commands.recipe import add_recipe, given_config
from megam3.config.batch_size import BatchRow, batch_arithmetic
from megam3.config.check import check_config
from megam3.config.deepspeed import build_deepspeed_config
from megam3.config.load import dump_config, recipe_names
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import RunConfig
from megam3.loss.settings import resolve_settings


def main(argv: Sequence[str]) -> int:
    """Print the resolved recipe, the batch arithmetic and the DeepSpeed dictionary as one YAML document with
    comments.

    Raises:
        ConfigError: whatever would stop the run before its first step.
    """
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
    print(describe(config, arguments.world_size, has_gpu=arguments.gpu), flush=True)
    check_config(config, arguments.world_size, files=not arguments.no_files)
    return 0


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
    settings = resolve_settings(config.objective)
    tables = {
        "losses": settings.loss_weights,
        "combined score": settings.sum_weights,
        "self-distillation": settings.distill_weights,
    }
    lines = [f"Weights (preset {config.objective.preset}):"]
    for name, table in tables.items():
        numbers = "off" if table is None else "  ".join(f"{k} {v:g}" for k, v in table.model_dump().items())
        lines.append(f"  {name:<17}  {numbers}")
    return [*lines, ""]


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
