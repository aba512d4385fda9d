"""An encoder for short texts → the same encoder with position rows for long ones.

megam3 extend-positions IN OUT [--max-tokens 8192] [--method tile]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args

from megam3.model.positions import PositionMethod, extend_folder


def main(argv: Sequence[str]) -> int:
    """Extend, print what changed, return the exit code.

    Raises:
        ConfigError: shrinking, or an encoder without learned positions.
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
        choices=get_args(PositionMethod),
        default="tile",
        help="repeat the old rows, stretch them over all positions, or draw new ones (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    before, after = extend_folder(options.source, options.out, options.max_tokens, options.method)
    what = {
        "tile": f"the first {before} positions are unchanged, the others repeat them",
        "interpolate": "the old positions are stretched over all of them",
        "random": f"the first {before} positions are unchanged, the others are drawn at random",
    }
    print(f"texts of up to {before} tokens → {after}; {what[options.method]}")
    print(f"written: {options.out} (tokenizer copied, model_max_length {after})")
    return 0
