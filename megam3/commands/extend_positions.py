"""An encoder for short texts → the same encoder for long ones: more rows in its table of positions, or, where
positions are rotary, other angles.

megam3 extend-positions IN OUT [--max-tokens 8192] [--method tile]
megam3 extend-positions MODERNBERT OUT --max-tokens 32768 --method yarn
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from megam3.model.positions import PositionMethod, extend_folder
from megam3.model.rotary import ROTARY_METHODS, scale_folder


def main(argv: Sequence[str]) -> int:
    """Extend, print what changed, return the exit code.

    Raises:
        ConfigError: shrinking, or a method for the other kind of positions.
        CheckpointError: unreadable weights, or OUT exists.
    """
    parser = argparse.ArgumentParser(
        prog="megam3 extend-positions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="IN", help="folder of the encoder")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="longest text, special tokens included (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        choices=[*get_args(PositionMethod), *ROTARY_METHODS],
        default="tile",
        help="of a table: repeat the old rows, stretch them over all positions, or draw new ones; of rotary"
        " positions: ntk or yarn (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    extend = scale_folder if options.method in ROTARY_METHODS else extend_folder
    before, after = extend(options.source, options.out, options.max_tokens, options.method)
    what = {
        "tile": f"the first {before} positions are unchanged, the others repeat them",
        "interpolate": "the old positions are stretched over all of them",
        "random": f"the first {before} positions are unchanged, the others are drawn at random",
        "ntk": "the rotary base is raised, and every position turns by new angles",
        "yarn": "slow rotary angles are interpolated, fast ones unchanged",
    }
    print(f"texts of up to {before} tokens → {after}; {what[options.method]}")
    print(f"written: {options.out} (tokenizer copied, model_max_length {after})")
    return 0
