"""The `megam3` command: a table of subcommands, each a `main(argv)` in a module of its own, loaded on use.

A UserError ends with its message and exit code 2; anything else is our bug and keeps its traceback.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megam3 import __version__
from megam3.errors import UserError, refused_path
from megam3.files import deny_writing_to_others

USER_ERROR_CODE = 2


@dataclass(frozen=True)
class Subcommand:
    """One line of `megam3 --help`."""

    module: str
    """Dotted name of a module with `main(argv: Sequence[str]) -> int | None`."""
    about: str


GROUPS = {
    "Begin": {
        "quickstart": Subcommand(
            "megam3.commands.quickstart",
            "fetch text, train, evaluate, export and query a small model (checkout)",
        ),
        "show-config": Subcommand(
            "megam3.commands.show_config", "a recipe resolved: every field, batch sizes, DeepSpeed dictionary"
        ),
        "explain": Subcommand("megam3.commands.explain", "a field of the recipe: type, default, meaning"),
        "completion": Subcommand(
            "megam3.commands.completion", "print a script for bash or zsh that completes all of this"
        ),
        "init-site": Subcommand(
            "megam3.commands.init_site",
            "write Slurm scripts, container files, recipes and DeepSpeed templates",
        ),
    },
    "Before a run": {
        "extend-positions": Subcommand(
            "megam3.commands.extend_positions", "position rows for long texts in an encoder for short ones"
        ),
        "mine": Subcommand("megam3.commands.mine", "hard negatives for training records, from any corpus"),
        "add-teacher-scores": Subcommand(
            "megam3.commands.add_teacher_scores",
            "scores of a cross-encoder or bi-encoder for training records",
        ),
        "prepare": Subcommand("megam3.commands.prepare", "tokenise a recipe's training data into its store"),
        "plan-epochs": Subcommand(
            "megam3.commands.plan_epochs", "steps, tokens, balance and languages of an epoch"
        ),
        "inspect-batch": Subcommand("megam3.commands.inspect_batch", "the batches of any step as text"),
        "plan-memory": Subcommand(
            "megam3.commands.plan_memory", "memory of one rank, counted; the chunk that fits"
        ),
        "import": Subcommand(
            "megam3.commands.import_model", "a model of others, by path or hub id, to continue from"
        ),
        "from-flagembedding": Subcommand(
            "megam3.commands.from_flagembedding", "a FlagEmbedding command line or script as a recipe"
        ),
    },
    "Run": {
        "train": Subcommand(
            "megam3.commands.train", "train in this process (several ranks: deepspeed or slurm/train.sh)"
        ),
    },
    "Several stages": {
        "pipeline": Subcommand(
            "megam3.commands.pipeline", "stages of a YAML file one after the other, restartable anywhere"
        ),
    },
    "After a run": {
        "merge": Subcommand("megam3.commands.merge", "one model from the weights of several"),
        "evaluate": Subcommand(
            "megam3.commands.evaluate", "five retrieval modes and BM25 on test sets in BEIR format"
        ),
        "search": Subcommand(
            "megam3.commands.search", "query your texts with an exported model: terminal, or a local page"
        ),
        "report": Subcommand("megam3.commands.report", "one HTML page about a run, or several side by side"),
        "export": Subcommand(
            "megam3.commands.export", "a checkpoint in the layout of another library, read back and compared"
        ),
    },
}

SUBCOMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `megam3 SUBCOMMAND …`; the exit code: the subcommand's own, or 2 after a UserError."""
    parser = argparse.ArgumentParser(
        prog="megam3",
        usage="megam3 SUBCOMMAND …",
        description="Train, evaluate and export M3 retrieval encoders.",
        epilog=_table() + "\n\nmegam3 SUBCOMMAND --help tells its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"megam3 {__version__}")
    parser.add_argument("subcommand", help=argparse.SUPPRESS)
    # only the first word is ours: everything after it, --help included, belongs to the subcommand
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = parser.parse_args(arguments[:1]).subcommand
    if name not in SUBCOMMANDS:
        near = difflib.get_close_matches(name, SUBCOMMANDS, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"use one of: {', '.join(SUBCOMMANDS)}"
        parser.error(f"there is no subcommand {name!r}; {remedy}")
    deny_writing_to_others()
    return report_user_errors(load(name), arguments[1:])


def load(name: str) -> Callable[[Sequence[str]], int | None]:
    """The function behind a subcommand, its module imported."""
    function: Callable[[Sequence[str]], int | None] = importlib.import_module(SUBCOMMANDS[name].module).main
    return function


def _table() -> str:
    width = max(map(len, SUBCOMMANDS))
    return "\n\n".join(
        "\n".join(
            [f"{heading}:", *(f"  {name:<{width}}  {command.about}" for name, command in group.items())]
        )
        for heading, group in GROUPS.items()
    )


def report_user_errors(function: Callable[[Sequence[str]], int | None], argv: Sequence[str]) -> int:
    """Call `function(argv)`; a UserError, or a path that the file system refuses, becomes one message on
    stderr and exit code 2."""
    try:
        return function(argv) or 0
    except UserError as error:
        return print_user_error(error)
    except OSError as error:
        refused = refused_path(error, "?", "name another path, or mend that")
        if refused is None:
            raise
        return print_user_error(refused)


def print_user_error(error: UserError, speaker: str = "") -> int:
    """One message on stderr, after the name of the rank that says it; returns the exit code for bad input."""
    print(f"megam3: {speaker}error: {error}", file=sys.stderr, flush=True)
    return USER_ERROR_CODE
