"""The `megam3` command: a table of subcommands, each a `main(argv)` in a module of its own, loaded when it is asked for.

A UserError ends with its message and exit code 2; anything else is our bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megam3 import __version__
from megam3.errors import UserError

USER_ERROR_CODE = 2


@dataclass(frozen=True)
class Subcommand:
    """One line of `megam3 --help`."""

    module: str
    """Dotted name of a module with `main(argv: Sequence[str]) -> int | None`; imported on use, so that light commands stay quick."""
    about: str


SUBCOMMANDS = {
    "quickstart": Subcommand(
        "megam3.quickstart.run", "fetch text, train, evaluate, export and query a small model"
    ),
    "show-config": Subcommand(
        "megam3.commands.show_config",
        "a recipe resolved: every field, batch arithmetic, DeepSpeed dictionary",
    ),
    "prepare": Subcommand("megam3.commands.prepare", "tokenise a recipe's training data into its store"),
    "plan-epochs": Subcommand(
        "megam3.commands.plan_epochs",
        "steps, tokens, balance and languages of an epoch, before anything runs",
    ),
    "plan-memory": Subcommand(
        "megam3.commands.plan_memory", "memory of one rank, counted; the chunk that fits, or what to turn on"
    ),
    "train": Subcommand("megam3.train", "train on this process's rank (deepspeed and srun start several)"),
    "evaluate": Subcommand(
        "megam3.commands.evaluate", "five retrieval modes and BM25 on test sets in BEIR format"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `megam3 SUBCOMMAND …`; the exit code: 0, or 2 after a UserError."""
    parser = argparse.ArgumentParser(
        prog="megam3", description="Train, evaluate and export M3 retrieval encoders.", add_help=True
    )
    parser.add_argument("--version", action="version", version=f"megam3 {__version__}")
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, command in SUBCOMMANDS.items():
        commands.add_parser(name, help=command.about, add_help=False)
    # only the first word is ours: everything after it, --help included, belongs to the subcommand
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = parser.parse_args(arguments[:1]).subcommand
    module = importlib.import_module(SUBCOMMANDS[name].module)
    return report_user_errors(module.main, arguments[1:])


def report_user_errors(function: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Call `function(argv)`; a UserError becomes one message on stderr and exit code 2."""
    try:
        return function(argv) or 0
    except UserError as error:
        return print_user_error(error)


def print_user_error(error: UserError, speaker: str = "") -> int:
    """One message on stderr, after the name of the rank that says it; returns the exit code for bad input."""
    print(f"megam3: {speaker}error: {error}", file=sys.stderr, flush=True)
    return USER_ERROR_CODE
