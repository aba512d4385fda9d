"""docs/architecture.md names functions that are there, and follows a batch in at most twelve stops."""

import ast
import re
from pathlib import Path

from tests.test_layers import LAYERS, ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STOPS = re.findall(r"^\| (\d+) \| `([^`]+)` \| `([^`]+)` \|", TEXT, re.MULTILINE)


def functions_in(path: Path) -> set[str]:
    """Functions, and methods as Class.method."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def test_every_stop_is_there_and_none_is_visited_twice() -> None:
    assert [int(number) for number, _, _ in STOPS] == list(range(1, len(STOPS) + 1))
    assert 8 <= len(STOPS) <= 12
    assert len({file for _, file, _ in STOPS}) == len(STOPS)
    missing = [(file, name) for _, file, name in STOPS if name not in functions_in(ROOT / file)]
    assert not missing


def test_the_picture_names_every_layer() -> None:
    picture = TEXT.split("## Layers")[1].split("## One batch")[0]
    words = set(re.findall(r"\w+", picture))
    units = {unit for layer in LAYERS for unit in layer} - {"__init__", "__main__", "report"}
    assert not units - words
