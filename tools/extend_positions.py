"""An encoder for short texts → the same encoder with position rows for long ones.

python tools/extend_positions.py IN OUT [--max-tokens 8192]
"""

import argparse
import sys
from collections.abc import Sequence

from megam3.cli import report_user_errors
from megam3.model.positions import extend_folder


def main(arguments: Sequence[str]) -> int:
    """Extend, print what changed, return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="IN", help="folder of the encoder")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=8192,
        help="longest text, special tokens included (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    before, after = extend_folder(options.source, options.out, options.max_tokens)
    print(
        f"texts of up to {before} tokens → {after}; the first {before} positions are unchanged, the others repeat them"
    )
    print(f"written: {options.out} (tokenizer copied, model_max_length {after})")
    return 0


if __name__ == "__main__":
    sys.exit(report_user_errors(main, sys.argv[1:]))
