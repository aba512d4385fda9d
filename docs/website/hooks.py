"""What the site adds to the Markdown files: pages made from the code, and links that lead out of docs/.

mkdocs calls `on_files` and `on_page_markdown` (docs/website/mkdocs.yml names this file).
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from megam3.cli import GROUPS, main
from megam3.config.reference import reference_page
from megam3.obs.health import EXIT_STALLED
from megam3.obs.launcher import EXIT_ORPHAN
from megam3.obs.stop import EXIT_REQUEUE, EXIT_STOPPED

logger = logging.getLogger("mkdocs.hooks")
"""mkdocs counts its warnings, and a strict build fails at the first."""

ROOT = Path(__file__).resolve().parents[2]
OUTWARD_LINK = re.compile(r"\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")
"""A link to a file of the repository that is no page of the site."""
HELP_COLUMNS = "100"
EXIT_CODES = {
    0: "done; in training: all steps are done, also when they were done before",
    1: "an error nobody expected, with its traceback; in training also: another rank has ended",
    2: "bad input: recipe, data, model, a full disk, values that are not finite; one message",
    EXIT_REQUEUE: "training saved on SIGUSR1 and is to be started again by the same line",
    EXIT_STALLED: "a rank, a collective call or the link between hosts made no progress; start it again",
    EXIT_ORPHAN: "the launcher died while a rank was importing or building; nothing was lost",
    EXIT_STOPPED: "training saved on SIGTERM or Ctrl-C and stays away; or a second signal ended it",
}
"""What `megam3` and `megam3.train` end with, from the constants of the code."""


NAMES_STAY_WHOLE = "td:first-child > code:only-child { white-space: nowrap; }\n"
"""Style of the site beside its theme: names of fields are not broken in the middle."""


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from the code, and README as the first page."""
    pages = {"fields.md": reference_page(), "commands.md": commands_page(), "names.css": NAMES_STAY_WHOLE}
    if "index.md" not in files.src_uris:
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        pages["index.md"] = readme.replace("](docs/", "](")
    for name, content in pages.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A link to a file of the repository becomes its name, since the site does not hold it; one to a file
    that is not there is warned of.
    """

    def name_of(match: re.Match[str]) -> str:
        if not (ROOT / match[2]).exists():
            logger.warning("%s links to %s, which is not in the repository", page.file.src_path, match[2])
        return match[1] if match[1].startswith("`") else f"`{match[2]}`"

    return OUTWARD_LINK.sub(name_of, markdown)


def commands_page() -> str:
    """Exit codes, then `--help` of every subcommand."""
    codes = [f"| {code} | {meaning} |" for code, meaning in sorted(EXIT_CODES.items())]
    parts = [
        "# Commands and exit codes",
        "This page is made from the code. `python -m megam3` is the same as `megam3`.",
        "\n".join(["## Exit codes", "", "| code | meaning |", "|---|---|", *codes]),
        "128 + N: signal N killed a data worker. What a cluster makes of each: [Clusters](cluster.md).",
    ]
    for heading, group in GROUPS.items():
        parts.append(f"## {heading}")
        parts += [f"### megam3 {name}\n\n```text\n{help_of(name)}```" for name in group]
    return "\n\n".join(parts) + "\n"


def help_of(name: str) -> str:
    """What `megam3 NAME --help` prints, at a fixed width."""
    if name == "quickstart":
        # it runs examples/ in a process of its own, whose output would not come back here
        return "megam3 quickstart [--data pairs.jsonl] [key=value…]\n"
    output = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = HELP_COLUMNS
    try:
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            main([name, "--help"])
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    return output.getvalue()
