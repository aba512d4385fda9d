"""Train one run in this process.

    megam3 train RECIPE [key=value…]

Several ranks are started by a launcher, one process each; all of them run `megam3.train`:

    deepspeed --num_gpus 8 --module megam3.train RECIPE [key=value…]
    sbatch slurm/train.sh RECIPE [key=value…]

The same command continues a run that was stopped. Exit codes: 0 finished, 2 bad input, 85 saved on SIGTERM or
SIGUSR1 and to be started again.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Check the command line, then hand it to `megam3.train`.

    That module loads torch and DeepSpeed, which takes seconds: by name and here, so that `--help` does
    without.
    """
    parser = argparse.ArgumentParser(
        prog="megam3 train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file, or the name of a packaged recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields that win over the recipe")
    given = parser.parse_intermixed_args(argv)
    code = importlib.import_module("megam3.train").main([given.recipe, *given.overrides])
    return int(code)
