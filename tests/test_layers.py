"""The import direction of the package, read from its source: a module has a layer and imports lower ones."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "megam3"

LAYERS = [
    {"errors", "files", "lexical_pairs", "__init__"},
    {"model_files"},
    {"encoders"},
    {"reading", "token_layers", "instructions"},
    {"config"},
    {"packed_texts"},
    {"batch", "dist"},
    {"cost"},
    {"obs", "data", "model", "scoring", "gradcache"},
    {"loss"},
    {"objectives", "engine", "planning", "embedder_processes"},
    {"checkpoint", "retrieval", "embedder", "export"},
    {"step", "starting_state"},
    {"step_health"},
    {"moments"},
    {"trainer", "report"},
    {"pipeline_file"},
    {"pipeline"},
    {"build", "cli", "train", "commands"},
    {"__main__"},
]
"""From the bottom; a name is a module or a package directly in megam3/."""

SAME_LAYER = {
    ("retrieval", "embedder"),
    ("train", "build"),
    ("train", "cli"),
    ("commands", "cli"),
}
"""(importer, imported) pairs of one layer that may meet."""

ONLY_IN = {
    "mpi4py": {"dist/env.py"},
    "tensorboard": {"obs/metrics.py"},
    "torch.utils.tensorboard": {"obs/metrics.py"},
    "triton": {"scoring/maxsim_triton.py"},
    "faiss": {"retrieval/index/nearest.py"},
    # the engine, the activation offload it hands out, and its checkpoints: read without one, written into any
    "deepspeed": {
        "engine/deepspeed.py",
        "engine/activations.py",
        "engine/adamw.py",
        "engine/swapped.py",
        "engine/consolidate.py",
        "engine/elastic.py",
    },
}
"""Third-party packages that one place wraps for everybody."""

SOURCES = sorted(PACKAGE.rglob("*.py"))


def layer_of(unit: str) -> int:
    found = [number for number, units in enumerate(LAYERS) if unit in units]
    assert found, (
        f"megam3/{unit} has no place in LAYERS of {Path(__file__).name}: decide on its layer and add it"
    )
    return found[0]


def unit_of(module: str) -> str:
    """megam3.data.plan -> data; megam3 -> __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports_in(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Absolute names that a tree imports, with their lines; relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parents = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            # `from megam3 import batch` names a module, `from megam3 import __version__` an attribute
            for alias in node.names:
                child = f"{base}.{alias.name}"
                is_module = (ROOT / child.replace(".", "/")).is_dir() or (
                    ROOT / f"{child.replace('.', '/')}.py"
                ).is_file()
                yield (child if is_module else base), node.lineno


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read(path: Path) -> tuple[str, ast.Module, bool]:
    return module_of(path), ast.parse(path.read_text(encoding="utf-8"), str(path)), path.name == "__init__.py"


def is_first_party(name: str) -> bool:
    return name == "megam3" or name.startswith("megam3.")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path: Path) -> None:
    module, tree, is_package = read(path)
    importer = unit_of(module)
    layer = layer_of(importer)
    wrong = [
        f"{path.relative_to(ROOT)}:{line} (layer {layer}) imports {name} (layer {layer_of(unit_of(name))})"
        for name, line in imports_in(tree, module, is_package)
        if is_first_party(name)
        and unit_of(name) != importer
        and (importer, unit_of(name)) not in SAME_LAYER
        and layer_of(unit_of(name)) >= layer
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_first_party_import_inside_a_function(path: Path) -> None:
    module, tree, is_package = read(path)
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    wrong = {
        f"{path.relative_to(ROOT)}:{line} imports {name} inside a function"
        for function in functions
        for name, line in imports_in(function, module, is_package)
        if is_first_party(name)
    }
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_party_seams(path: Path) -> None:
    module, tree, is_package = read(path)
    place = str(path.relative_to(PACKAGE))
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}; only {', '.join(sorted(places))} may"
        for name, line in imports_in(tree, module, is_package)
        for seam, places in ONLY_IN.items()
        if (name == seam or name.startswith(f"{seam}.")) and place not in places
    ]
    assert not wrong, "\n".join(wrong)


def test_dynamic_imports_are_few_and_known() -> None:
    # the table of subcommands; `megam3 train`, whose --help does without torch; a worker process, which gets
    # its entry function by name from the parent that spawned it; and the package of objectives, which imports
    # each of its own files, so that a stage is one file; onnx and mteb, third-party packages that few need,
    # are loaded when asked for; trackers, which are extras; what `import megam3` offers, loaded on use; and
    # DeepSpeed's Muon, imported with its compiler switched off
    known = {"cli.py", "commands/train.py", "data/process.py", "objectives/__init__.py"}
    known |= {"export/onnx.py", "retrieval/mteb_model.py", "obs/trackers.py", "__init__.py"}
    known |= {"engine/deepspeed.py"}
    # a module of DeepSpeed's, imported with its compiler switched off
    known |= {"engine/deepspeed.py"}
    wrong = []
    for path in SOURCES:
        module, tree, is_package = read(path)
        names = {name for name, _ in imports_in(tree, module, is_package)}
        if "importlib" in names and str(path.relative_to(PACKAGE)) not in known:
            wrong.append(str(path.relative_to(ROOT)))
    assert not wrong, f"importlib hides imports from this test: {wrong}"


def test_no_catch_all_modules() -> None:
    names = {"utils", "util", "common", "misc", "helpers", "helper"}
    assert not [str(path) for path in PACKAGE.rglob("*") if path.stem in names]


def test_top_level_of_the_repository() -> None:
    allowed = {
        "megam3",
        "ds_configs",
        "slurm",
        "tools",
        "tests",
        "setup.py",
        "README.md",
        "CHANGELOG.md",
        "LICENSE",
        "Makefile",
    }
    allowed |= {
        "pyproject.toml",
        "constraints.txt",
        "benchmarks",
        "docs",
        "examples",
        ".ci",
        ".gitignore",
        ".git",
        ".venv",
        "runs",
        "build",
        "dist",
    }
    extra = [path.name for path in ROOT.iterdir() if path.name not in allowed and "cache" not in path.name]
    assert not [name for name in extra if not name.endswith(".egg-info") and name != ".hypothesis"]


def test_the_rules_themselves_catch_violations(tmp_path: Path) -> None:
    tree = ast.parse(
        "import megam3.trainer\nfrom ..data import plan\nfrom . import heads\n"
        "from megam3 import batch, __version__\n"
    )
    names = [name for name, _ in imports_in(tree, "megam3.model.m3", is_package=False)]
    assert [unit_of(name) for name in names] == [
        "trainer",
        "data",
        "model",
        "batch",
        "__init__",
    ]
    assert layer_of("trainer") > layer_of("model")
    with pytest.raises(AssertionError, match="has no place in LAYERS"):
        layer_of("somewhere")
