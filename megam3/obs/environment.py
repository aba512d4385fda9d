"""What env.json records: versions, code revision, ranks and hardware. Of the environment's variables nothing
is recorded: tokens and keys are among them.
"""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path

import torch

from megam3.dist import comm

PACKAGE = Path(__file__).resolve().parents[1]
_GIT_SECONDS = 20.0


@dataclass(frozen=True)
class CodeRevision:
    """Which state of a checkout runs."""

    commit: str
    """Full hash."""
    is_changed: bool
    """Whether tracked files differ from it."""


def describe_environment(device: torch.device) -> dict[str, object]:
    """The content of env.json."""
    processor = platform.processor() or platform.machine()
    revision = code_revision()
    return {
        "python": platform.python_version(),
        "git": asdict(revision) if revision else None,
        "packages": package_versions(),
        "world_size": comm.world_size(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor,
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
    }


def package_versions() -> dict[str, str]:
    """Every installed distribution and its version, by name: what requirements require counts too."""
    found: dict[str, str] = {}
    for distribution in distributions():
        # the first on the path is the one that is imported; a broken one has no name
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(name.lower(), distribution.version)
    return dict(sorted(found.items()))


def code_revision(package: Path = PACKAGE) -> CodeRevision | None:
    """Revision of the checkout that `package` is part of; None: it is installed, or there is no git.

    A package that merely lies below a checkout, in its virtual environment, is no part of it: its file must
    be tracked.
    """
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    changes = _git(package, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None or changes is None else CodeRevision(commit, bool(changes))


def _git(folder: Path, *arguments: str) -> str | None:
    # without the lock: `git status` must not write into a checkout that many jobs share
    environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=_GIT_SECONDS)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
