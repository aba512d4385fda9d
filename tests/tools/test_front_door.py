"""Every tool is a subcommand of `megam3` with the same options, and no file is named that is not there."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from megam3.cli import SUBCOMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(path for path in (ROOT / "tools").glob("*.py") if path.stem != "train")
"""All but the one that launchers start, which is `megam3.train` (tests/test_launchers.py)."""
KNOWN_NAMES = {"convert_to_hf": "export"}
"""Tools that keep the name under which people look for them."""


def subcommand_of(tool: Path) -> str:
    return KNOWN_NAMES.get(tool.stem, tool.stem.replace("_", "-"))


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    """argparse breaks a usage line by the caller's terminal."""
    monkeypatch.setenv("COLUMNS", "110")


def help_of(capfd: pytest.CaptureFixture[str]) -> str:
    text = capfd.readouterr().out
    assert text.startswith("usage: megam3 ")
    return text


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\\w-])--[a-z][a-z-]*", text))


@pytest.mark.parametrize("name", [name for name in SUBCOMMANDS if name != "quickstart"])
def test_every_subcommand_has_a_help_of_its_own(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert help_of(capfd).startswith(f"usage: megam3 {name} ")


@pytest.mark.slow
def test_quickstart_has_a_help_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["quickstart", "--help"]) == 0
    assert "--data" in options_in(help_of(capfd))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_a_tool_has_the_options_of_its_subcommand(
    tool: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit):
        main([subcommand_of(tool), "--help"])
    expected = help_of(capfd)
    monkeypatch.setattr(sys, "argv", [str(tool), "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(tool), run_name="__main__")
    assert caught.value.code == 0
    found = help_of(capfd)
    assert options_in(found) == options_in(expected) > {"--help"}
    assert found == expected


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_a_tool_is_a_thin_main_that_names_its_subcommand(tool: Path) -> None:
    source = tool.read_text(encoding="utf-8")
    assert f"`megam3 {subcommand_of(tool)}`" in source
    assert "def " not in source


FILE_NAMES = re.compile(
    r"\b(?:megam3|tools|slurm|ds_configs|examples|tests)/[\w./-]+\.(?:py|sh|json|yaml|md)\b"
)


@pytest.mark.parametrize(
    "folder",
    [
        "tools",
        "megam3",
        "examples",
        "slurm",
        "ds_configs",
        "README.md",
        "Makefile",
        "docs",
    ],
)
def test_files_that_are_named_exist(folder: str) -> None:
    place = ROOT / folder
    files = (
        [place] if place.is_file() else [f for f in place.rglob("*.*") if f.suffix not in (".pyc", ".png")]
    )
    missing = [
        f"{file.relative_to(ROOT)} names {name}"
        for file in files
        for name in FILE_NAMES.findall(file.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    ]
    assert not missing, "\n".join(missing)
