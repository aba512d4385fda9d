"""A training checkpoint of any ZeRO stage and world size → a Hugging Face folder, without GPUs or ranks.

python tools/convert_to_hf.py runs/NAME/checkpoints/step-000500 OUT [--model FOLDER]
"""

import argparse
import sys
from collections.abc import Sequence

from megam3.checkpoint import consolidated_weights
from megam3.cli import report_user_errors
from megam3.export.hf_folder import export_hf_folder, source_of_checkpoint


def main(arguments: Sequence[str]) -> int:
    """Convert, print the largest difference per head, return the exit code.

    Raises:
        CheckpointError: no complete checkpoint, no source folder, an export that differs, or OUT exists.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder of one checkpoint")
    parser.add_argument("out", help="folder to write; must not exist")
    parser.add_argument(
        "--model",
        help="folder the training started from (default: model.path of the run's recipe, else the checkpoint's model/)",
    )
    options = parser.parse_args(arguments)
    state = consolidated_weights(options.checkpoint)
    differences = export_hf_folder(
        state, options.model or source_of_checkpoint(options.checkpoint), options.out
    )
    for head, value in differences.items():
        print(f"largest difference, {head} head: {value:.2e}")
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(report_user_errors(main, sys.argv[1:]))
