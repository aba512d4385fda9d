"""Fields of the recipe as text, from the schema: `megam3 explain`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megam3.config.explain import FOREIGN_NAMES, all_fields, sections_at
from megam3.config.schema import RunConfig
from megam3.errors import ConfigError

BOUNDS = {
    "gt": ">",
    "ge": ">=",
    "lt": "<",
    "le": "<=",
    "min_length": "at least items:",
    "max_length": "at most items:",
}
"""How the limits in a type's metadata are written."""


def section_names() -> list[str]:
    """Top-level fields of a recipe, in its order."""
    return list(RunConfig.model_fields)


def describe_field(name: str) -> str:
    """Type, default, section and description of a field given as in an override; a section lists its fields.

    Indices of lists may be left out (`data.train.weight`). A field that several stages have is told once for
    each.

    Raises:
        ConfigError: there is no such field; names the nearest.
    """
    parts, sections = _sections_of(name)
    return "\n\n".join(_block(name, parts, section) for section in sections)


def field_facts(name: str) -> list[dict[str, Any]]:
    """As `describe_field`, for programs: one entry a stage that has the field.

    Raises:
        ConfigError: there is no such field; names the nearest.
    """
    parts, sections = _sections_of(name)
    facts = []
    for section in sections:
        field = section.model_fields[parts[-1]]
        inner = [model for model in sections_at(parts) if model is not section]
        facts.append(
            {
                "name": name,
                "type": type_name(field),
                "default": default_text(field),
                "section": section.__name__,
                "meaning": " ".join("".join(_description(field, inner)).split()),
                "fields": {key: _sentence(f) for model in inner for key, f in model.model_fields.items()},
            }
        )
    return facts


def _sections_of(name: str) -> tuple[tuple[str, ...], list[type[BaseModel]]]:
    parts = tuple(part for part in name.split(".") if not part.isdecimal())
    sections = [s for s in sections_at(parts[:-1]) if parts and parts[-1] in s.model_fields]
    if not sections:
        raise _unknown(name)
    return parts, sections


def _unknown(name: str) -> ConfigError:
    names = list(dict.fromkeys(field.replace(".0.", ".") for field in all_fields()))
    last = name.rsplit(".", 1)[-1]
    # a bare name is looked for in every section before it is taken for a misspelling
    found = [field for field in names if field.rsplit(".", 1)[-1] == last]
    near = FOREIGN_NAMES.get(last) or next(iter(found or difflib.get_close_matches(name, names, 1)), None)
    remedy = f"did you mean {near}?" if near else f"use one of the sections: {', '.join(section_names())}"
    return ConfigError("field", name, "is not in the recipe's schema", remedy)


def _block(name: str, parts: tuple[str, ...], section: type[BaseModel]) -> str:
    field = section.model_fields[parts[-1]]
    path = ".".join(parts[:-1]) or "the recipe itself"
    about = " ".join((section.__doc__ or "").split("\n\n")[0].split())
    inner = [model for model in sections_at(parts) if model is not section]
    lines = [
        name,
        f"  type     {type_name(field)}",
        f"  default  {default_text(field)}",
        f"  section  {path}: {about}",
        *_description(field, inner),
    ]
    for model in inner:
        width = max(map(len, model.model_fields))
        lines += ["", f"  fields of {model.__name__}:"]
        lines += [f"    {key:<{width}}  {_sentence(f)}".rstrip() for key, f in model.model_fields.items()]
    return "\n".join(lines)


def _description(field: FieldInfo, inner: list[type[BaseModel]]) -> Iterator[str]:
    text = field.description or (inner[0].__doc__ if len(inner) == 1 else None)
    if text:
        yield "  " + " ".join(text.split("\n\n")[0].split())


def _sentence(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).split(". ")[0]


def default_text(field: FieldInfo) -> str:
    """A field's default as a recipe would write it."""
    if field.is_required():
        return "none: required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "all defaults of its fields"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def type_name(field: FieldInfo) -> str:
    """A field's type with its bounds, in words."""
    return _with_bounds(_name_of(field.annotation), field.metadata)


def _name_of(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _with_bounds(_name_of(arguments[0]), arguments[1:])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(_name_of(argument) for argument in arguments)
    if origin is list:
        return f"list of {_name_of(arguments[0])}"
    return "null" if annotation is NoneType else getattr(annotation, "__name__", str(annotation))


def _with_bounds(name: str, metadata: Any) -> str:
    bounds = [
        f"{sign} {getattr(item, key)}"
        for item in metadata
        for key, sign in BOUNDS.items()
        if getattr(item, key, None) is not None
    ]
    return f"{name} ({', '.join(bounds)})" if bounds else name
