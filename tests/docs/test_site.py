"""The site builds strictly: a link to a page, heading or file that is not there stops it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megam3.cli import SUBCOMMANDS

ROOT = Path(__file__).resolve().parents[2]

EXIT_CODE = re.compile(r"^EXIT_\w+ = (\d+)$", re.MULTILINE)
"""How the package names an exit code."""

needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("material", "mkdocstrings")),
    reason="mkdocs-material or mkdocstrings is missing: pip install -c constraints.txt -e '.[docs]'",
)


def build(config: Path, out: Path) -> subprocess.CompletedProcess[str]:
    # no --quiet: it would silence the warnings before a strict build counts them
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(
        [*command, "--config-file", str(config), "--site-dir", str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def names_of_fields() -> list[str]:
    """Of a fresh process: tests of the seam between objectives define sections of their own in this one."""
    code = "from megam3.config.explain import all_fields; print(*all_fields())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.slow
@needs_mkdocs
def test_the_site_builds_strictly_with_the_pages_made_from_the_code(tmp_path: Path) -> None:
    built = build(ROOT / "docs/website/mkdocs.yml", tmp_path / "site")
    assert built.returncode == 0, built.stdout + built.stderr
    fields = (tmp_path / "site/fields.html").read_text(encoding="utf-8")
    fields = fields.replace(".0", "")
    names = {name.replace(".0", "") for name in names_of_fields()}
    assert [name for name in sorted(names) if f"<code>{name}</code>" not in fields] == []
    commands = (tmp_path / "site/commands.html").read_text(encoding="utf-8")
    assert [name for name in SUBCOMMANDS if f"usage: megam3 {name} " not in commands] == ["quickstart"]
    codes = {code for file in (ROOT / "megam3").rglob("*.py") for code in EXIT_CODE.findall(file.read_text())}
    assert len(codes) > 4
    assert [code for code in sorted(codes) if f"<td>{code}</td>" not in commands] == []
    assert "Coming from FlagEmbedding" in (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "encode" in (tmp_path / "site/api.html").read_text(encoding="utf-8")


@pytest.mark.slow
@needs_mkdocs
def test_links_to_nothing_stop_the_build(tmp_path: Path) -> None:
    website = tmp_path / "docs/website"
    website.mkdir(parents=True)
    links = "[a](nowhere.md) [b](#no-heading) [c](../megam3/nowhere.py) [d](../megam3/cli.py)"
    (tmp_path / "docs/index.md").write_text(f"# Page\n\n{links}\n", encoding="utf-8")
    hooks = (ROOT / "docs/website/hooks.py").as_posix()
    (website / "mkdocs.yml").write_text(
        f"site_name: x\ndocs_dir: ..\nexclude_docs: website/\nhooks: [{hooks}]\n"
        "validation: {links: {not_found: warn, anchors: warn}}\n",
        encoding="utf-8",
    )
    built = build(website / "mkdocs.yml", tmp_path / "site")
    said = built.stdout + built.stderr
    assert built.returncode != 0
    assert all(name in said for name in ("nowhere.md", "#no-heading", "megam3/nowhere.py")), said
    assert "cli.py" not in said
