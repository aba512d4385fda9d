"""Fetch the GNOME help pages with the machine's own package manager; nothing is installed system-wide.

Debian's and Ubuntu's package `gnome-user-docs` holds about 300 help pages in about 40 languages (CC BY-SA
3.0). It is downloaded and unpacked into a folder. Machines whose package lists were removed (slim containers)
get lists of their own inside that folder.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from megam3.errors import DataError

logger = logging.getLogger(__name__)

PACKAGE = "gnome-user-docs"
_REMEDY = (
    f"use a Debian or Ubuntu machine where `apt-get download {PACKAGE}` works, "
    "or give your own pairs with DATA=file.jsonl"
)


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}
    )


def _private_lists(folder: Path) -> list[str]:
    """Options that keep apt's package lists and cache inside `folder`, so that `update` needs no root and
    changes nothing outside."""
    state, cache = folder / "apt-state", folder / "apt-cache"
    for path in (state / "lists" / "partial", cache / "archives" / "partial"):
        path.mkdir(parents=True, exist_ok=True)
    return [
        "-o",
        f"Dir::State::lists={state / 'lists'}",
        "-o",
        f"Dir::Cache={cache}",
        "-o",
        "APT::Sandbox::User=",
    ]


def _download(folder: Path) -> Path:
    attempts: list[list[str]] = [[], _private_lists(folder)]
    reason = ""
    for options in attempts:
        if options:
            _run(["apt-get", *options, "update", "-q"], folder)
        result = _run(["apt-get", *options, "download", "-q", PACKAGE], folder)
        packages = sorted(folder.glob("*.deb"))
        if result.returncode == 0 and packages:
            return packages[0]
        reason = (result.stderr.strip().splitlines() or ["no package came"])[-1]
    raise DataError("quickstart corpus", PACKAGE, f"apt-get could not download it ({reason})", _REMEDY)


def fetch_help_pages(folder: str | Path) -> Path:
    """The folder `…/usr/share/help` of the unpacked package under `folder`; downloaded once, found again
    afterwards.

    Raises:
        DataError: no apt-get or dpkg here, or the download failed; says that DATA=file.jsonl is the other
            way.
    """
    folder = Path(folder).resolve()  # the programs below run inside it
    unpacked = folder / PACKAGE
    pages = unpacked / "usr" / "share" / "help"
    if pages.is_dir():
        return pages
    for program in ("apt-get", "dpkg"):
        if shutil.which(program) is None:
            raise DataError(
                "quickstart corpus",
                PACKAGE,
                f"there is no {program} on this machine to fetch it with",
                _REMEDY,
            )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=folder) as aside:
        package = _download(Path(aside))
        result = _run(["dpkg", "-x", str(package), "unpacked"], Path(aside))
        if result.returncode != 0:
            raise DataError(
                "quickstart corpus",
                package.name,
                f"dpkg could not unpack it ({result.stderr.strip()})",
                _REMEDY,
            )
        os.replace(Path(aside) / "unpacked", unpacked)
    logger.info("fetched %s into %s", package.name, unpacked)
    return pages
