"""docs/training.md: the tests it names exist, its recipes and figures are real."""

import ast
import re
from pathlib import Path

import pytest

from megam3.config.load import recipe_names

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/\S+\.py)(?: -k (\w+))?`", PAGE)


def functions(path: Path) -> list[str]:
    return [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def test_the_page_names_tests() -> None:
    assert len(NAMED) >= 10


@pytest.mark.parametrize(("file", "words"), NAMED)
def test_the_tests_it_names_exist(file: str, words: str) -> None:
    names = [name for name in functions(ROOT / file) if name.startswith("test_")]
    assert any(words in name for name in names), f"{file} has no test for -k {words}"


def test_its_recipes_files_and_sections_exist() -> None:
    rows = PAGE.split("## Which stage")[1].split("## What to watch")[0]
    recipes = set(re.findall(r"`([a-z_]+)`", rows)) - {"_node"}
    assert {"finetune", "unified", "pretrain", "contrastive"} <= recipes <= set(recipe_names())
    assert {f"{name}_node" for name in ("pretrain", "contrastive", "unified")} <= set(recipe_names())
    for path in re.findall(r"`((?:examples|benchmarks)/\S+)`", PAGE):
        assert (ROOT / path).exists(), path
    experiments = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for section in re.findall(r"experiments, \"([^\"]+)\"", PAGE):
        assert re.search(rf"^## .*{re.escape(section)}", experiments, re.MULTILINE), section
