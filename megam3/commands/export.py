"""A training checkpoint of any ZeRO stage and world size → a Hugging Face folder, without GPUs or ranks.

megam3 export runs/NAME/checkpoints/step-000500 OUT [--model FOLDER]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from megam3.dist.env import prepare_environment

# DeepSpeed, which reads the checkpoint, looks for an accelerator while it is imported, and warns where there
# is none
prepare_environment(os.environ)

from megam3.checkpoint import consolidated_weights
from megam3.export.hf_folder import export_hf_folder, source_of_checkpoint


def main(argv: Sequence[str]) -> int:
    """Convert, print the largest difference per head, return the exit code.

    Raises:
        CheckpointError: no complete checkpoint, no source folder, an export that differs, or OUT exists.
    """
    parser = argparse.ArgumentParser(
        prog="megam3 export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="folder of one checkpoint")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="folder the training started from (default: model.path of the run's recipe, else the "
        "checkpoint's model/)",
    )
    options = parser.parse_args(argv)
    state = consolidated_weights(options.checkpoint)
    differences = export_hf_folder(
        state, options.model or source_of_checkpoint(options.checkpoint), options.out
    )
    for head, value in differences.items():
        print(f"largest difference, {head} head: {value:.2e}")
    print(f"written: {options.out}")
    return 0
