"""`megam3 plan-memory RECIPE [key=value…] --gpus N --gpu-memory 80`: what a run holds in memory, before
anything is started.

Prints one rank's memory at the worst moment of a step, the largest `data.batch.chunk_tokens` that fits, or
what to turn on; then the fastest settings that fit, with their predicted cost.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from megam3.commands.recipe import add_recipe, local_config
from megam3.config.check import check_config
from megam3.planning.choice import chosen
from megam3.planning.memory import plan_memory
from megam3.planning.memory_report import (
    GIB,
    advice,
    choice_lines,
    fastest,
    lengths_line,
    table,
)
from megam3.planning.recipe import heaviest_step, read_model_shape, read_strategy, stored_lengths


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megam3 plan-memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_recipe(parser)
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="ranks, over all nodes (default: 1)")
    parser.add_argument(
        "--gpu-memory", type=float, default=80.0, metavar="GB", help="memory of one GPU in GiB (default: 80)"
    )
    parser.add_argument(
        "--reserve",
        type=float,
        default=2.0,
        metavar="GB",
        help="left to CUDA, NCCL and fragmentation (default: 2 GiB)",
    )
    parser.add_argument("--json", action="store_true", help="the plan as one JSON document")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print the plan; 1 when the step does not fit and nothing this command knows would make it fit.

    Raises:
        ConfigError: a recipe that would not start, or an encoder of a family that is not counted.
    """
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.gpus < 1 or arguments.gpu_memory <= arguments.reserve:
        parser.error("--gpus must be at least 1 and --gpu-memory more than --reserve")
    config = local_config(arguments, weights=False)
    check_config(config, arguments.gpus, files=False)
    longest = stored_lengths(config)
    choice = chosen(config, arguments.gpus, int(arguments.gpu_memory * GIB), on_gpu=True, longest=longest)
    config = config if choice is None else choice.config
    model, strategy = read_model_shape(config), read_strategy(config, arguments.gpus, on_gpu=True)
    tokens, step = heaviest_step(config, model, strategy, longest)
    plan = plan_memory(model, strategy, step)
    limit = int((arguments.gpu_memory - arguments.reserve) * GIB)
    lines, fits = advice(model, strategy, step, limit)
    candidates = fastest(config, model, arguments.gpus, limit, longest)
    if arguments.json:
        facts = {
            "template": config.engine.template,
            "ranks": arguments.gpus,
            "longest_text_tokens": tokens,
            "longest_text_is_known": longest is not None,
            "step": asdict(step),
            "bytes": {**plan.states, **plan.step, "peak": plan.total_bytes},
            "limit_bytes": limit,
            "fits": fits,
            "advice": lines,
            "fastest": [
                {"setting": each.setting.fields(), "peak_bytes": each.peak_bytes, "cost": each.cost}
                for each in candidates
            ],
        }
        print(json.dumps(facts, indent=2))
        return 0 if fits else 1
    print("\n".join([lengths_line(config, longest)] if choice is None else [*choice.lines, ""]))
    print("\n".join(table(config, tokens, step, strategy, plan)))
    print("\n".join(["", *lines]))
    print("\n".join(["", *choice_lines(candidates, limit)]))
    return 0 if fits else 1
