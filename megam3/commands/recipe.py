"""The two arguments that every subcommand about a recipe takes: RECIPE [key=value…]."""

from __future__ import annotations

import argparse
from typing import Any

from megam3.config.load import load_config
from megam3.config.schema import RunConfig
from megam3.model.hub import with_local_model


def add_recipe(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add both; `parse_intermixed_args` then reads the line, so that options may stand between overrides."""
    nargs: dict[str, Any] = {} if required else {"nargs": "?"}
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe", **nargs
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="fields that win over the recipe, e.g. optim.lr=2e-5",
    )


def given_config(arguments: argparse.Namespace) -> RunConfig:
    """The configuration that the two arguments mean.

    Raises:
        ConfigError: of the recipe or an override.
    """
    return load_config(arguments.recipe, arguments.overrides)


def local_config(arguments: argparse.Namespace, *, weights: bool = True) -> RunConfig:
    """As `given_config`, with a model of the hub downloaded, for commands that read the model's files;
    `weights=False`: all but the weights of its encoder.

    Raises:
        ConfigError: of the recipe, an override, or a model that cannot be had.
    """
    return with_local_model(given_config(arguments), weights=weights)
