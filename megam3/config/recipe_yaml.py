"""YAML as recipes read it: the YAML 1.2 core schema, the line of each value, bounds on what a file holds.

YAML 1.1, which PyYAML follows, reads `lr: 1e-5` as a string, `language: no` as False and `1:30` as ninety.
ruamel.yaml follows 1.2: `1e-5` is a float and only true/false are booleans. A key written twice is an error
that names both lines.

Three passes, so that no file can take more than bounded memory or Python stack:

    events    flat, without recursion: nesting depth
    nodes     every node as often as aliases repeat it: number of values, lines, keys written twice
    objects   safe ones only: null, booleans, numbers, strings, lists, mappings
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode
from ruamel.yaml.reader import ReaderError

from megam3.errors import ConfigError

Path = tuple[str | int, ...]

MAX_BYTES = 1_000_000
"""Recipes have a few thousand bytes; one that lists ten thousand files still fits."""
MAX_DEPTH = 40
"""Levels of nesting; data.batch.buckets and data.train.N.paths are the deepest fields, at level 5."""
MAX_VALUES = 100_000
"""Values after aliases are followed: nine levels of nine aliases stand for 9⁹ values in 300 bytes of text."""


class _RecipeConstructor(SafeConstructor):
    """ruamel.yaml's safe constructor; dates stay text, since no field of a recipe is one."""


_RecipeConstructor.add_constructor("tag:yaml.org,2002:timestamp", SafeConstructor.construct_yaml_str)


@dataclass(frozen=True)
class Document:
    """A parsed YAML file: its `data` and where each path was written, as `file:line`."""

    data: object
    where: dict[Path, str]


def parse(text: str, source: str) -> Document:
    """Parse one YAML document; `source` names it in messages.

    Raises:
        ConfigError: invalid YAML, a key written twice, or more than the bounds above, with `source:line`.
    """
    try:
        _check_depth(text, source)
        node = _reader().compose(text)
        if node is None:
            return Document(None, {(): f"{source}:1"})
        lines = _Lines(source)
        lines.note(node, ())
        return Document(_reader().constructor.construct_document(node), lines.where)
    except ConfigError:
        raise  # a ValueError too
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _invalid(text, source, line, f"{_spelled(error.character)} is not allowed in text") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise _invalid(text, source, line, str(error.problem or error.context)) from None
    except (YAMLError, ValueError) as error:
        # ValueError: a number that Python does not convert, such as one of ten thousand digits
        raise _invalid(text, source, 1, str(error).splitlines()[0]) from None


def read(path: str | os.PathLike[str]) -> Document:
    """Parse the YAML file `path`.

    Raises:
        ConfigError: not readable as UTF-8, larger than a recipe can be, or as `parse`.
    """
    try:
        # before it is read: a recipe given by mistake may be a data file of many gigabytes
        size = os.stat(path).st_size
        if size > MAX_BYTES:
            rule = f"has {size} bytes, more than the {MAX_BYTES} of any recipe"
            raise ConfigError("recipe", str(path), rule, "name a recipe")
        with open(path, encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        rule = f"cannot be read ({error})"
        raise ConfigError("recipe", str(path), rule, "give a readable UTF-8 file") from None
    return parse(text, str(path))


def parse_value(text: str) -> object:
    """The value of a `key=value` override, read as in a recipe: `1e-5`, `true`, `null`, `[1, 2]`, `a string`.

    Raises:
        ConfigError: not valid YAML.
    """
    return parse(text, "value").data


def dump(data: object) -> str:
    """YAML text that `parse` reads back as the same `data`; keys stay in their order."""
    writer: Any = YAML(typ="safe", pure=True)  # its settings are annotated as None
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False
    writer.width = 120
    stream = io.StringIO()
    writer.dump(data, stream)
    return stream.getvalue()


def dotted(path: Path) -> str:
    """A path as written in an override.

    >>> dotted(("data", "train", 0, "weight"))
    'data.train.0.weight'
    """
    return ".".join(str(part) for part in path)


def _reader() -> YAML:
    reader = YAML(typ="safe", pure=True)
    reader.Constructor = _RecipeConstructor
    return reader


def _check_depth(text: str, source: str) -> None:
    depth = 0
    for event in _reader().parse(text):
        if isinstance(event, CollectionStartEvent):
            depth += 1
        elif isinstance(event, CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise _too_deep(f"{source}:{event.start_mark.line + 1}")


def _too_deep(place: str) -> ConfigError:
    return ConfigError(place, f"level {MAX_DEPTH + 1}", "is nested too deeply for a recipe", "write it flat")


@dataclass
class _Lines:
    """Where each path of a document is written; checks keys and counts values on the way."""

    source: str
    where: dict[Path, str] = field(default_factory=dict)
    num_values: int = 0

    def note(self, node: Node, path: Path) -> None:
        """Record `node` at `path` and everything below it."""
        place = self._place(node)
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise ConfigError(
                place,
                f"over {MAX_VALUES} values",
                "aliases (*name) repeat more than a recipe can mean",
                "write the values out",
            )
        if len(path) > MAX_DEPTH:
            raise _too_deep(place)  # the events were flat enough: an alias inside what it stands for
        self.where.setdefault(path, place)
        if isinstance(node, SequenceNode):
            for index, item in enumerate(node.value):
                self.note(item, (*path, index))
        elif isinstance(node, MappingNode):
            self._note_mapping(node, path)

    def _note_mapping(self, node: MappingNode, path: Path) -> None:
        for key, value in node.value:
            child = (*path, str(key.value))
            place = self._place(key)
            if child in self.where:
                raise ConfigError(
                    f"{dotted(child)} ({place})",
                    key.value,
                    f"is written twice, first at {self.where[child]}",
                    "keep one of the two",
                )
            self.where[child] = place
            self.note(value, child)

    def _place(self, node: Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}"


def _invalid(text: str, source: str, line: int, reason: str) -> ConfigError:
    lines = text.splitlines()
    shown = lines[line - 1].strip()[:100] if 0 < line <= len(lines) else ""
    return ConfigError(f"{source}:{line}", shown, f"not valid YAML ({reason})", "correct this line")


def _spelled(character: object) -> str:
    code = character if isinstance(character, int) else ord(str(character))
    return f"the control character U+{code:04X}"
