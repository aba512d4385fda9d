"""Recipe and overrides in, validated RunConfig out: defaults < recipe YAML < `a.b.c=value`.

Every problem names the field, the value, the rule, the remedy and where it was written; all problems of a
recipe come at once.

    load_config("unified", ["optim.lr=2e-5", "data.train.0.weight=2"])
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megam3.config import recipe_yaml
from megam3.config.explain import explain
from megam3.config.schema import RunConfig
from megam3.errors import ConfigError, raise_all

RECIPE_DIR = Path(__file__).resolve().parent.parent / "recipes"

PATH_FIELDS = (
    ("output_dir",),
    ("model", "path"),
    ("data", "store_dir"),
    ("data", "train", "*", "paths", "*"),
    ("evaluation", "folders", "*"),
    ("engine", "template"),
)
"""Fields in which `~` is the home folder, as in a shell; `*` is every item of a list."""


def recipe_names() -> list[str]:
    """Names of the packaged recipes, sorted."""
    return sorted(path.stem for path in RECIPE_DIR.glob("*.yaml"))


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe given as a path or as the name of a packaged one.

    Raises:
        ConfigError: neither; lists the packaged names.
    """
    path = Path(recipe)
    if path.is_file():
        return path
    packaged = RECIPE_DIR / f"{recipe}.yaml"
    if path.parent == Path(".") and packaged.is_file():
        return packaged
    names = recipe_names()
    near = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    rule = (
        "is a folder, not a recipe file"
        if path.is_dir()
        else "no such file, and no packaged recipe has this name"
    )
    raise ConfigError(
        "recipe", str(recipe), rule, f"{hint}give a path to a YAML file or one of: {', '.join(names)}"
    )


def load_config(recipe: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a recipe (a path, or the name of a packaged one), apply `key=value` overrides, validate.

    Raises:
        ConfigError: unreadable file, invalid YAML, unknown key, wrong type or value, bad override;
            `GroupedConfigError` for several.
    """
    path = find_recipe(recipe)
    document = recipe_yaml.read(path)
    if not isinstance(document.data, dict):
        raise ConfigError(
            str(path), document.data, "a recipe is a YAML mapping of sections", "start it with `name: …`"
        )
    where = dict(document.where)
    raise_all(problem for override in overrides if (problem := _try_override(document.data, override, where)))
    for field in PATH_FIELDS:
        _expand_home(document.data, field)
    return parse_config(document.data, where)


def parse_config(data: dict[str, Any], where: dict[recipe_yaml.Path, str] | None = None) -> RunConfig:
    """Validate plain data; `where` tells for a path where it was written.

    Raises:
        ConfigError: unknown key, wrong type or value; `GroupedConfigError` for several.
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise_all(explain(error, data, where or {}))
        raise  # explain() returns at least one problem for a ValidationError, so this line is never reached


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults written out; `load_config` reads back an equal RunConfig."""
    return recipe_yaml.dump(config.model_dump())


def _expand_home(node: Any, field: Sequence[str]) -> None:
    """Replace a leading `~` or `~user` in the paths at `field`; what is no text is left to validation."""
    if isinstance(node, list) and field[0] == "*":
        for index, item in enumerate(node):
            _expand_in(node, index, item, field)
    elif isinstance(node, dict) and field[0] in node:
        _expand_in(node, field[0], node[field[0]], field)


def _expand_in(parent: Any, key: str | int, value: Any, field: Sequence[str]) -> None:
    if len(field) > 1:
        _expand_home(value, field[1:])
    elif isinstance(value, str):
        parent[key] = os.path.expanduser(value)


def _try_override(
    data: dict[str, Any], override: str, where: dict[recipe_yaml.Path, str]
) -> ConfigError | None:
    try:
        _apply_override(data, override, where)
    except ConfigError as error:
        return error
    return None


def _apply_override(data: dict[str, Any], override: str, where: dict[recipe_yaml.Path, str]) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(
            "override", override, "is not of the form key=value", "write for example optim.lr=2e-5"
        )
    try:
        value = recipe_yaml.parse_value(text)
    except ConfigError:
        raise ConfigError(
            f"override {key}", text, "its value is not valid YAML", "quote it, for example 'key=\"a: b\"'"
        ) from None
    node: Any = data
    path: recipe_yaml.Path = ()
    for position, part in enumerate(parts):
        step = _step_into(node, part, path, override)
        path = (*path, step)
        is_new = isinstance(node, dict) and node.get(step) is None
        if isinstance(node, list) and step == len(node):
            node.append({})  # one behind the last: a new entry
            is_new = True
        if is_new:
            where[path] = f"override {override}"  # what is missing in it is missing here
        if position == len(parts) - 1:
            node[step] = value
        elif is_new and isinstance(node, dict):
            node[step] = [] if parts[position + 1].isdecimal() else {}
        node = node[step]
    # what an override wrote hides the recipe's own lines below it
    for known in [known for known in where if known[: len(path)] == path]:
        del where[known]
    where[path] = f"override {override}"


def _step_into(node: Any, part: str, path: recipe_yaml.Path, override: str) -> str | int:
    if isinstance(node, dict):
        return part
    field = recipe_yaml.dotted(path)
    if not isinstance(node, list):
        raise ConfigError(
            f"{field} (override {override})",
            node,
            f"is a value, so it has no part {part!r}",
            f"set {field} itself, or remove the rest",
        )
    if not part.isdecimal() or int(part) > len(node):
        present = f"0 to {len(node) - 1}, or " if node else ""
        raise ConfigError(
            f"{field} (override {override})",
            part,
            f"is a list of {len(node)}, and this is no index of it",
            f"use an index: {present}{len(node)} to append",
        )
    return int(part)
