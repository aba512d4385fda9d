"""Every field of a recipe as one page of Markdown, from the schema alone: docs/fields.md is made of it.

    python -m megam3.config.reference    prints the page

The page repeats the docstrings below the fields and nothing else: it cannot say what the code does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megam3.config.describe import default_text, type_name
from megam3.config.explain import models_in
from megam3.config.schema import RunConfig

TITLE = "# Every field of a recipe"
INTRODUCTION = """\
This page is made from the schema. `megam3 explain FIELD` prints the same for one field, and
`megam3 show-config RECIPE` a whole recipe with the defaults written out. A field without a default is
required. On the command line a field is written `section.field=value`; in a list, by its index:
`data.train.0.weight=2.0`."""
LIST_INDEX = ".0"
"""Stands for any element in the name of a field below a list."""


def reference_page() -> str:
    """The page, one table a section, in the order of the schema."""
    return "\n\n".join([TITLE, INTRODUCTION, *sections(RunConfig, "")]) + "\n"


def sections(section: type[BaseModel], prefix: str) -> Iterator[str]:
    """The Markdown of one section, then of those inside it, depth first.

    A field that takes one of several sections (`objective`, one a stage) gives one table for each.
    """
    yield _section(section, prefix)
    for name, field in section.model_fields.items():
        inner = list(models_in(field.annotation))
        for model in inner:
            yield from sections(model, f"{prefix}{name}{_index(field)}.")


def _index(field: FieldInfo) -> str:
    is_list = type_name(field).startswith("list of ")
    return LIST_INDEX if is_list else ""


def _section(section: type[BaseModel], prefix: str) -> str:
    heading = prefix.rstrip(".") or "The recipe itself"
    kind = section.model_fields.get("kind")
    if kind is not None and prefix == "objective.":
        # one heading a stage: otherwise all would have the same anchor
        heading += f" ({default_text(kind).strip(chr(39))})"
    about = " ".join((section.__doc__ or "").split())
    rows = [
        f"| `{prefix}{name}` | {_row(field, prefix + name)} |" for name, field in section.model_fields.items()
    ]
    return "\n".join(
        [f"## {heading}", "", about, "", "| field | type | default | meaning |", "|---|---|---|---|", *rows]
    )


def _row(field: FieldInfo, name: str) -> str:
    kind, inner = type_name(field), list(models_in(field.annotation))
    if len(inner) == 1:
        kind = f"[{kind}](#{_anchor(name + _index(field))})"
    meaning = " ".join((field.description or "").split()) or _meaning(field)
    # a bar would end the cell, also inside backquotes
    return " | ".join(text.replace("|", "\\|") for text in (kind, f"`{default_text(field)}`", meaning))


def _anchor(heading: str) -> str:
    """As Python-Markdown makes it: only letters, digits, hyphens and underscores stay."""
    return re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-"))


def _meaning(field: FieldInfo) -> str:
    """Of a field whose section says it all: that section's first sentence."""
    inner = list(models_in(field.annotation))
    return " ".join((inner[0].__doc__ or "").split()) if len(inner) == 1 else "see the sections below"


if __name__ == "__main__":
    print(reference_page(), end="")
