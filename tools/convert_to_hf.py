"""A training checkpoint of any ZeRO stage and world size → a Hugging Face folder, without GPUs or ranks.

python tools/convert_to_hf.py runs/NAME/checkpoints/step-000500 OUT [--model FOLDER]
"""

import argparse
import sys

from megam3.checkpoint import consolidated_weights
from megam3.errors import UserError
from megam3.export.hf_folder import export_hf_folder, source_of_checkpoint


def main(arguments: list[str] | None = None) -> int:
    """Convert, print the largest difference per head, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder of one checkpoint")
    parser.add_argument("out", help="folder to write; must not exist")
    parser.add_argument("--model", help="folder the training started from (default: model.path of the run's recipe)")
    options = parser.parse_args(arguments)
    try:
        source = options.model or source_of_checkpoint(options.checkpoint)
        differences = export_hf_folder(consolidated_weights(options.checkpoint), source, options.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for head, value in differences.items():
        print(f"largest difference, {head} head: {value:.2e}")
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
