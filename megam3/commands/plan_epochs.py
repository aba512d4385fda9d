"""`megam3 plan-epochs RECIPE [key=value…]`: what an epoch of a prepared recipe will be, before anything
runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megam3.commands.prepare import store_folder
from megam3.config.load import load_config
from megam3.data.dataset import open_training_data
from megam3.data.report import estimate_plan, plan_report
from megam3.data.tokenizer import load_tokenizer


def main(argv: Sequence[str]) -> int:
    """Print steps, tokens, padding avoided, balance of ranks, cells and the share of each language.

    Raises:
        UserError: of the recipe or its data.
    """
    parser = argparse.ArgumentParser(prog="megam3 plan-epochs", description=__doc__)
    parser.add_argument("recipe", help="a YAML file, or the name of a packaged recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields that win over the recipe")
    parser.add_argument("--world-size", type=int, default=1, help="ranks (default: 1)")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.recipe, arguments.overrides)
    data = open_training_data(
        config.data, load_tokenizer(config.model.path), store_folder(config), config.train.seed
    )
    data.check_world_size(arguments.world_size)
    estimate = estimate_plan(data.plan, data.assembler(), arguments.world_size)
    print(plan_report(data.plan, estimate, config.data.batch.accumulation_steps, arguments.world_size))
    return 0
