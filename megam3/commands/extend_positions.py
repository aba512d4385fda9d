"""An encoder for short texts → the same encoder with position rows for long ones.

megam3 extend-positions IN OUT [--max-tokens 8192]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megam3.model.positions import extend_folder


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
    options = parser.parse_args(argv)
    before, after = extend_folder(options.source, options.out, options.max_tokens)
    print(
        f"texts of up to {before} tokens → {after}; "
        f"the first {before} positions are unchanged, the others repeat them"
    )
    print(f"written: {options.out} (tokenizer copied, model_max_length {after})")
    return 0
