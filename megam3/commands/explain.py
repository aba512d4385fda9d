"""`megam3 explain FIELD`: a field of the recipe by type, default, section and meaning; or a section by its
fields.

    megam3 explain optim.head_lr
    megam3 explain optim
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from megam3.config.describe import describe_field, section_names


def main(argv: Sequence[str]) -> int:
    """Print what the schema says of a field.

    Raises:
        ConfigError: no such field; names the nearest.
    """
    parser = argparse.ArgumentParser(
        prog="megam3 explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "field", nargs="?", help="as in an override, for example optim.head_lr; none: the sections"
    )
    field = parser.parse_args(argv).field
    print(describe_field(field) if field else "\n".join(section_names()))
    return 0
