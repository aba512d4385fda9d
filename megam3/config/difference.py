"""What differs between the recipe a checkpoint was written with and the present one, for the log of a resumed
run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ABSENT = "(absent)"


def recipe_changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines `field: old -> new`, in the order of the present recipe; fields of one side only are said to be
    absent on the other.

    >>> recipe_changes({"optim": {"lr": 1e-5, "eps": 1e-8}}, {"optim": {"lr": 2e-5, "eps": 1e-8}})
    ['optim.lr: 1e-05 -> 2e-05']
    """
    old, new = dict(_leaves(was, "")), dict(_leaves(now, ""))
    names = [*new, *(name for name in old if name not in new)]
    pairs = [(name, old.get(name, ABSENT), new.get(name, ABSENT)) for name in names]
    return [f"{name}: {_show(a)} -> {_show(b)}" for name, a, b in pairs if a != b]


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        for index, item in enumerate(node):
            yield from _leaves(item, f"{path}.{index}")
    else:
        yield path, node


def _show(value: Any) -> str:
    return value if value is ABSENT else repr(value)
