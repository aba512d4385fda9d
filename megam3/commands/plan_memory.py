"""`megam3 plan-memory RECIPE [key=value…] --gpus N --gpu-memory 80`: what a run holds in memory, before
anything is started.

Prints one rank's memory at the worst moment of a step, the largest `data.batch.chunk_tokens` that fits, or
what to turn on; then the fastest settings that fit, with their predicted cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megam3.commands.recipe import add_recipe, given_config
from megam3.config.check import check_config
from megam3.planning.memory import plan_memory
from megam3.planning.memory_report import (
    GIB,
    advice,
    choice_lines,
    fastest,
    heaviest_step,
    read_model_shape,
    read_strategy,
    table,
)


def main(argv: Sequence[str]) -> int:
    """Print the plan; 1 when the step does not fit and nothing this command knows would make it fit.

    Raises:
        ConfigError: a recipe that would not start, or an encoder of a family that is not counted.
    """
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
    arguments = parser.parse_intermixed_args(argv)
    if arguments.gpus < 1 or arguments.gpu_memory <= arguments.reserve:
        parser.error("--gpus must be at least 1 and --gpu-memory more than --reserve")
    config = given_config(arguments)
    check_config(config, arguments.gpus, files=False)
    model, strategy = read_model_shape(config), read_strategy(config, arguments.gpus, on_gpu=True)
    edge, step = heaviest_step(config, model, strategy)
    print("\n".join(table(config, edge, step, strategy, plan_memory(model, strategy, step))))
    limit = int((arguments.gpu_memory - arguments.reserve) * GIB)
    lines, fits = advice(model, strategy, step, limit)
    print("\n".join(["", *lines]))
    # texts for pretraining have no gradient cache: the enumeration is of retrieval steps
    if config.objective.data_kind != "text":
        candidates = fastest(config, model, arguments.gpus, limit)
        print("\n".join(["", *choice_lines(candidates, limit)]))
    return 0 if fits else 1
