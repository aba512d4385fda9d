"""`--query-instruction` and `--passage-instruction` of the commands that encode texts with a model folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from megam3.instructions import Instructions, read_instructions


def add_instruction_options(parser: argparse.ArgumentParser, exception: str = "") -> None:
    """Add both; `exception` is said of queries."""
    default = "(default: what the model's folder says; '' for nothing)"
    parser.add_argument(
        "--query-instruction",
        default=None,
        metavar="TEXT",
        help=f"put before every query{exception} {default}",
    )
    parser.add_argument(
        "--passage-instruction", default=None, metavar="TEXT", help=f"put before every passage {default}"
    )


def given_instructions(given: argparse.Namespace, folder: str | Path) -> Instructions:
    """What the user asks for, else what the model's folder says.

    Raises:
        ConfigError: the folder's file of prompts is no JSON object.
    """
    return read_instructions(folder).replaced(given.query_instruction, given.passage_instruction)
