"""A model of others → a folder that training continues from.

megam3 import SOURCE OUT        SOURCE: a folder, or a hub id (owner/name or owner/name@revision)

With --new-heads a model without them gets the heads that training would start: a whole model, to evaluate
before training and to merge with afterwards (`megam3 merge`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megam3.export.imported import import_model
from megam3.model.hub import resolve_model


def main(argv: Sequence[str]) -> int:
    """Resolve, convert, say what was found; return the exit code.

    Raises:
        ConfigError, CheckpointError: no such model, or one that cannot be served.
    """
    parser = argparse.ArgumentParser(
        prog="megam3 import", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or hub id")
    parser.add_argument("out", metavar="OUT", help="folder to write; must not exist")
    parser.add_argument(
        "--new-heads", action="store_true", help="also write the heads that SOURCE lacks, untrained"
    )
    options = parser.parse_args(argv)
    model = resolve_model(options.source)
    if model.revision:
        print(f"revision: {model.revision}")
    imported = import_model(model.folder, options.out, new_heads=options.new_heads)
    print(f"heads with weights: {', '.join(('dense', *imported.heads))}")
    for note in imported.notes():
        print(f"note: {note}")
    if options.new_heads:
        print("the others were written as training would start them")
    print(f"written: {options.out}; train with model.path={options.out}")
    return 0
