"""YAML as recipes read it: the YAML 1.2 core schema with the line of every value.

PyYAML follows YAML 1.1, where `lr: 1e-5` is a string, `language: no` is False and `1:30` is ninety. Here `1e-5` is a float,
only true/false are booleans, and a key written twice is an error instead of a silent loss of the first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from megam3.errors import ConfigError

Path = tuple[str | int, ...]

_RESOLVERS = (
    ("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"^(?:[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
    ("tag:yaml.org,2002:merge", re.compile(r"^<<$"), ["<"]),
)


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict = {}


class RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes exactly what `RecipeLoader` would read as something else."""

    yaml_implicit_resolvers: dict = {}


for _tag, _pattern, _first in _RESOLVERS:
    RecipeLoader.add_implicit_resolver(_tag, _pattern, _first)
    RecipeDumper.add_implicit_resolver(_tag, _pattern, _first)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    # PyYAML reads 010 as eight; YAML 1.2 and everybody's eyes read ten
    text = str(node.value).replace("_", "")
    return int(text, 16) if text.startswith("0x") else int(text, 10)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(node.value).replace("_", "").lower()
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


RecipeLoader.add_constructor("tag:yaml.org,2002:int", _construct_int)
RecipeLoader.add_constructor("tag:yaml.org,2002:float", _construct_float)


@dataclass(frozen=True)
class Document:
    """A parsed YAML file: its `data` and where each path was written, as `file:line`."""

    data: object
    where: dict[Path, str]


def parse(text: str, source: str) -> Document:
    """Parse one YAML document; `source` names it in messages.

    Raises:
        ConfigError: invalid YAML, or a key written twice, with `source:line`.
    """
    loader = RecipeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return Document(None, {(): f"{source}:1"})
        where: dict[Path, str] = {}
        _note_lines(node, (), source, where)
        return Document(loader.construct_document(node), where)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(
            f"{source}:{line}",
            _line_of(text, line),
            f"not valid YAML ({error.problem or error.context})",
            "correct this line",
        ) from None
    finally:
        loader.dispose()


def _line_of(text: str, line: int) -> str:
    lines = text.splitlines()
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def _note_lines(node: yaml.Node, path: Path, source: str, where: dict[Path, str]) -> None:
    where.setdefault(path, f"{source}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _note_lines(item, (*path, index), source, where)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            child = (*path, str(key.value))
            line = f"{source}:{key.start_mark.line + 1}"
            if child in where:
                raise ConfigError(
                    f"{dotted(child)} ({line})",
                    key.value,
                    f"is written twice, first at {where[child]}",
                    "keep one of the two",
                )
            where[child] = line
            _note_lines(value, child, source, where)


def parse_value(text: str) -> object:
    """The value of a `key=value` override, by the same rules as a recipe: `1e-5`, `true`, `null`, `[1, 2]`, `a string`.

    Raises:
        yaml.YAMLError: not valid YAML.
    """
    return yaml.load(text, Loader=RecipeLoader)


def dump(data: object) -> str:
    """YAML text that `parse` reads back as the same `data`; keys stay in their order."""
    return yaml.dump(data, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=120)


def dotted(path: Path) -> str:
    """A path as written in an override.

    >>> dotted(("data", "train", 0, "weight"))
    'data.train.0.weight'
    """
    return ".".join(str(part) for part in path)
