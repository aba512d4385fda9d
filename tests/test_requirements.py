"""What is imported is declared in setup.py, what is declared is imported, and each requirement is pinned."""

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

DISTRIBUTIONS = {
    "huggingface_hub": "huggingface-hub",
    "faiss": "faiss-cpu",
    "pytrec_eval": "pytrec-eval-terrier",
    "ruamel": "ruamel.yaml",
    # pydantic pins the one version of its core that it works with; a range of ours could only contradict it
    "pydantic_core": "pydantic",
}
"""Distribution of an import name, where the two differ."""

USED_BY_OTHERS = {
    "accelerate": "transformers loads weights partitioned under ZeRO-3 through it",
    "protobuf": "transformers reads sentencepiece models through it",
    "sentencepiece": "transformers' slow tokenizers; the quickstart trains one",
    "tensorboard": "torch.utils.tensorboard, which megam3 imports, writes with its record types",
}
"""Declared for what megam3 imports, although megam3 does not import it."""

NOT_DECLARED = {
    "peft": "the extra lora; a recipe with model.lora is refused without it",
    "triton": "builds of torch for CUDA bring the one they were made with; elsewhere nothing uses it",
}
"""Imported where it is there."""

TOOLS = {"mypy", "pytest-xdist", "ruff"}
"""Of the dev extra: programs, and pytest's several processes (Makefile)."""

PEERS = {"FlagEmbedding", "datasets", "mteb", "nemo_automodel", "pylate", "sentence_transformers"}
"""Imported only by scripts that run in a peer's own environment (benchmarks/environments.py, tests/peers)."""


def imported_by(folders: Iterable[str]) -> set[str]:
    """Top-level names of all third-party imports below folders of the repository."""
    own = {"megam3", "tests", "tools", "examples", "benchmarks"}
    names = {
        name.split(".")[0]
        for folder in folders
        for file in (ROOT / folder).rglob("*.py")
        if not any(part.startswith(".") for part in file.relative_to(ROOT).parts)
        for name in imports_of(ast.parse(file.read_text(encoding="utf-8")))
    }
    return names - own - set(sys.stdlib_module_names)


def imports_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def declared(keyword: str) -> set[str]:
    """Distributions in the setup() call: under `install_requires`, or in an extra of that name."""
    calls = [
        node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if isinstance(node, ast.Call)
    ]
    setup = next(call for call in calls if getattr(call.func, "id", "") == "setup")
    values = {item.arg: item.value for item in setup.keywords}
    if keyword != "install_requires":
        extras = values["extras_require"]
        assert isinstance(extras, ast.Dict)
        values = {str(ast.literal_eval(key)): value for key, value in zip(extras.keys, extras.values) if key}
    return {re.split(r"[<>=!~; \[]", text)[0] for text in ast.literal_eval(values[keyword])}


def distribution_of(name: str) -> str:
    return DISTRIBUTIONS.get(name, name)


def test_what_the_library_imports_is_declared() -> None:
    needed = {distribution_of(name) for name in imported_by(["megam3", "tools", "examples"])}
    assert needed - declared("install_requires") == set(NOT_DECLARED)


def test_what_is_declared_is_imported_by_the_library() -> None:
    needed = {distribution_of(name) for name in imported_by(["megam3"])}
    assert declared("install_requires") - needed == set(USED_BY_OTHERS)


def test_tests_and_benchmarks_import_what_is_declared_or_in_the_dev_extra() -> None:
    needed = {distribution_of(name) for name in imported_by(["tests", "benchmarks"])}
    everything = declared("install_requires") | declared("dev")
    assert needed - everything == PEERS
    assert declared("dev") - needed == TOOLS | (set(NOT_DECLARED) - needed)


@pytest.mark.parametrize(
    "requirement",
    sorted(
        declared("install_requires")
        | declared("dev") - {"triton"}
        | set.union(*(declared(extra) for extra in ("docs", "wandb", "mlflow", "lora")))
    ),
)
def test_every_requirement_is_pinned(requirement: str) -> None:
    pins = (ROOT / "constraints.txt").read_text().lower().replace("_", "-").splitlines()
    assert any(line.startswith(f"{requirement.lower()}==") for line in pins)
