"""`megam3 plan-epochs RECIPE [key=value…]`: what an epoch of a prepared recipe will be, before anything
runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from megam3.commands.recipe import add_recipe, local_config
from megam3.data.dataset import open_training_data
from megam3.data.report import estimate_plan, plan_facts, plan_report
from megam3.data.tokenizer import load_tokenizer


def main(argv: Sequence[str]) -> int:
    """Print steps, tokens, padding avoided, balance of ranks, cells and the share of each language.

    Raises:
        UserError: of the recipe or its data.
    """
    parser = argparse.ArgumentParser(prog="megam3 plan-epochs", description=__doc__)
    add_recipe(parser)
    parser.add_argument("--world-size", type=int, default=1, help="ranks (default: 1)")
    parser.add_argument("--json", action="store_true", help="the plan as one JSON document")
    arguments = parser.parse_intermixed_args(argv)
    config = local_config(arguments, weights=False)
    data = open_training_data(
        config.data, load_tokenizer(config.model.path), config.store_dir, config.train.seed
    )
    data.check_world_size(arguments.world_size)
    estimate = estimate_plan(data.plan, data.assembler(), arguments.world_size)
    if arguments.json:
        facts = plan_facts(data.plan, estimate, config.data.batch.accumulation_steps, arguments.world_size)
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    print(plan_report(data.plan, estimate, config.data.batch.accumulation_steps, arguments.world_size))
    return 0
