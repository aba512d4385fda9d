"""`megam3 merge A B [C…] OUT`: one model from the weights of several.

    megam3 merge start runs/one/export merged --weights 0.3,0.7
    megam3 merge a b merged --method slerp --weights 0.5,0.5

Users fight forgetting with it: what finetuning gained in its domain mostly stays, what it lost elsewhere
mostly returns. Config, tokenizer and other files come from the first folder. The models must agree in names
and shapes; a bare encoder (where a finetuning began whose heads were new) leaves the heads to the others.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megam3.errors import ConfigError
from megam3.export.merge import METHODS, merge_folders
from megam3.model.folder import model_folder


def main(argv: Sequence[str]) -> int:
    """Merge, and say where it lies.

    Raises:
        UserError: see `megam3.export.merge.merge_folders`.
    """
    parser = argparse.ArgumentParser(
        prog="megam3 merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="the models, then the folder to write")
    parser.add_argument("--weights", default=None, help="one a model, e.g. 0.7,0.3 (default: equal)")
    parser.add_argument("--method", choices=METHODS, default="average", help="(default: %(default)s)")
    given = parser.parse_args(argv)
    *folders, out = given.folders
    models = [model_folder(folder) for folder in folders]
    count = merge_folders(models, out, parse_weights(given.weights), given.method)
    print(f"{out}: {count} tensors of {len(models)} models by {given.method}")
    return 0


def parse_weights(text: str | None) -> list[float] | None:
    """Numbers separated by commas.

    Raises:
        ConfigError: something that is no number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        rule, remedy = "must be numbers separated by commas", "write for example --weights 0.7,0.3"
        raise ConfigError("--weights", text, rule, remedy) from None
