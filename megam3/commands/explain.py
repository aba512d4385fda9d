"""`megam3 explain NAME`: a field of the recipe by type, default, section and meaning; a section by its
fields; or what a figure of metrics.jsonl means.

    megam3 explain optim.head_lr
    megam3 explain optim
    megam3 explain lexical/nonzero_share
    megam3 explain figures
"""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Sequence
from typing import Any

from megam3.config.describe import describe_field, field_facts, section_names
from megam3.errors import ConfigError
from megam3.obs.figures import FIGURES, meaning

ALL_FIGURES = "figures"


def main(argv: Sequence[str]) -> int:
    """Print what the schema says of a field, or the table of figures of one.

    Raises:
        ConfigError: no such field or figure; names the nearest.
    """
    parser = argparse.ArgumentParser(
        prog="megam3 explain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "field",
        nargs="?",
        metavar="NAME",
        help="as in an override, for example optim.head_lr; a figure; none: the sections",
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON document")
    given = parser.parse_args(argv)
    print(json.dumps(_facts(given.field), indent=2, ensure_ascii=False) if given.json else _text(given.field))
    return 0


def _text(name: str | None) -> str:
    if name is None:
        return "\n".join([*section_names(), f"{ALL_FIGURES} (of metrics.jsonl)"])
    figures = _figures(name)
    if figures is None:
        return describe_field(name)
    width = max(map(len, figures))
    return "\n".join(f"{figure:<{width}}  {text}" for figure, text in figures.items())


def _facts(name: str | None) -> Any:
    if name is None:
        return {"sections": section_names(), "figures": FIGURES}
    return _figures(name) or field_facts(name)


def _figures(name: str) -> dict[str, str] | None:
    """Figures by name and meaning; None when a field of the recipe is meant."""
    if name == ALL_FIGURES:
        return FIGURES
    if "/" not in name:
        return None
    text = meaning(name)
    if text is None:
        near = difflib.get_close_matches(name, FIGURES, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"see megam3 explain {ALL_FIGURES}"
        raise ConfigError("figure", name, "is not among those that a run logs", remedy)
    return {name: text}
