"""Every command of README and docs is accepted by the real parsers; recipes and overrides load."""

import argparse
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from examples.quickstart import run as quickstart
from megam3.cli import SUBCOMMANDS, main
from megam3.config.load import load_config
from tests.docs.blocks import PAGES, ROOT, Command, commands, fences, named_options

FOR_NAMES = {"N": "8", "GB": "80"}
"""What stands in the place of a number."""
COMMANDS = [command for page in PAGES for command in commands(page)]
OURS = [command for command in COMMANDS if command.megam3_arguments() is not None]
RECIPES = {path.stem for path in (ROOT / "megam3/recipes").glob("*.yaml")}
OTHER_PROGRAMS = (
    "pip",
    "python",
    "make",
    "git",
    "cd",
    "mkdocs",
    "MEGAM3_PEER_PYTHON",
    "MEGAM3_BENCH_PYTHON",
    "cat",
    "nice",
    "ls",
)


class Parsed(Exception):  # noqa: N818 - not an error: it ends a command after its parser
    """The parser accepted the line."""

    def __init__(self, given: argparse.Namespace):
        self.given = given


@pytest.fixture
def only_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parser but the one that picks the subcommand ends the command with what it understood."""

    def ending(method: Any) -> Any:
        def parse(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> argparse.Namespace:
            given = method(self, *args, **kwargs)
            if self.prog != "megam3":
                raise Parsed(given)
            return given  # type: ignore[no-any-return]

        return parse

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, ending(getattr(argparse.ArgumentParser, name)))


def recipe_of(name: str, page: Path, folder: Path) -> str:
    """A packaged recipe, the page's own one written out, or for a placeholder a packaged one."""
    if name in RECIPES or (ROOT / name).is_file():
        return name
    for body in fences(page, "yaml") + fences(ROOT / "README.md", "yaml"):
        if YAML(typ="safe").load(body).get("name") == Path(name).stem:
            file = folder / f"{Path(name).stem}.yaml"
            file.write_text(body, encoding="utf-8")
            return str(file)
    return "finetune"


@pytest.mark.parametrize("command", OURS, ids=str)
def test_a_command_is_accepted(command: Command, only_parse: None, tmp_path: Path) -> None:
    arguments = [FOR_NAMES.get(word, word) for word in command.megam3_arguments() or []]
    # the command of a checkout starts a process; its script is called here
    start = main if arguments[0] != "quickstart" else lambda words: quickstart.main(words[1:])
    with pytest.raises(Parsed) as caught:
        start(arguments)
    given = caught.value.given
    if getattr(given, "recipe", None) and hasattr(given, "overrides"):
        kept = [text for text in given.overrides if "…" not in text and text != "key=value"]
        load_config(recipe_of(given.recipe, ROOT / command.page, tmp_path), kept)


def test_commands_are_found_and_others_are_known() -> None:
    assert len(OURS) > 40
    assert {command.page for command in OURS} >= {"README.md", "docs/export.md", "docs/getting-started.md"}
    others = [command for command in COMMANDS if command.megam3_arguments() is None]
    assert [str(c) for c in others if not c.line.startswith(OTHER_PROGRAMS)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_subcommands_and_options_in_running_text_exist(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    helps: dict[str, str] = {}
    for name, option in named_options(page):
        if name.startswith("-") or not name.islower():
            continue  # `megam3 SUBCOMMAND`, `megam3 --help`
        assert name in SUBCOMMANDS, f"{page.name}: megam3 {name}"
        if option and name != "quickstart":
            if name not in helps:
                with pytest.raises(SystemExit):
                    main([name, "--help"])
                helps[name] = capsys.readouterr().out
            assert f"{option} " in helps[name] or f"{option}\n" in helps[name] or f"{option}]" in helps[name]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_in_pages_load(page: Path, tmp_path: Path) -> None:
    for number, body in enumerate(fences(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(body, encoding="utf-8")
        if "name" in YAML(typ="safe").load(body):
            load_config(str(file), [])
        else:  # a part of one
            part = YAML(typ="safe").load(body)
            flat = [
                f"{section}.{key}={_flow(value)}"
                for section, keys in part.items()
                for key, value in keys.items()
            ]
            load_config("finetune", flat)


def _flow(value: Any) -> str:
    """A value as an override writes it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def test_readme_begins_with_what_to_copy() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (first, *_), (recipe,), (data,) = (fences(ROOT / "README.md", kind) for kind in ("sh", "yaml", "json"))
    assert len(first.splitlines()) == 5
    assert all(line.startswith(("pip install", "megam3 ")) for line in first.splitlines())
    assert len(recipe.splitlines()) == 15
    assert len(data.splitlines()) == 2
    parts = [
        first,
        recipe,
        data,
        "| BM25",
        "```text",
        "## Coming from",
        "## What is not there",
        "## A run is",
    ]
    places = [text.index(part) for part in [*parts, "## What is guaranteed"]]
    assert places == sorted(places)
