"""A FlagEmbedding M3 command line or script → the equivalent recipe.

megam3 from-flagembedding 'torchrun … -m FlagEmbedding.finetune.embedder.encoder_only.m3 …' [--out
recipe.yaml] megam3 from-flagembedding train.sh
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megam3.config import recipe_yaml
from megam3.config.check import check_config
from megam3.config.flagembedding import migrate
from megam3.config.load import parse_config
from megam3.errors import ConfigError
from megam3.files import atomic_file


def main(argv: Sequence[str]) -> int:
    """Print the recipe on stdout (or write --out) and what differs on stderr; return the exit code.

    Raises:
        ConfigError: no such call in it, an unknown argument, a recipe that breaks a rule, or --out exists.
    """
    parser = argparse.ArgumentParser(
        prog="megam3 from-flagembedding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", help="the command line in quotes, or a script file")
    parser.add_argument("--out", metavar="FILE", help="write the recipe there instead of printing it")
    options = parser.parse_args(argv)
    migration = migrate(_read(options.command))
    check_config(parse_config(migration.recipe), 1, files=False)
    text = recipe_yaml.dump(migration.recipe)
    if options.out is None:
        print(text, end="")
    else:
        if Path(options.out).exists():
            raise ConfigError("--out", options.out, "exists already", "remove it or choose another name")
        with atomic_file(options.out, "w") as stream:
            stream.write(text)
        print(f"written: {options.out}")
    for note in migration.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0


def _read(command: str) -> str:
    # a command line is no file name: it has spaces, and may be longer than a name can be
    if " -m " in command:
        return command
    try:
        return Path(command).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        rule = f"is neither a command line nor a readable script ({type(error).__name__})"
        raise ConfigError("command", command[:80], rule, "quote the whole command line") from None
