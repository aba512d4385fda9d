"""`megam3 quickstart`: start examples/quickstart/run.py of the checkout that this package belongs to."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import megam3
from megam3.errors import ConfigError

SCRIPT = Path("examples") / "quickstart" / "run.py"


def main(argv: Sequence[str]) -> int:
    """Run the script with `argv`; its exit code.

    Raises:
        ConfigError: the package was installed without its checkout.
    """
    top = Path(megam3.__file__).resolve().parents[1]
    if not (top / SCRIPT).is_file():
        raise ConfigError(
            "quickstart",
            str(top / SCRIPT),
            "is an example in megam3's repository, which an installed package does not bring",
            "clone the repository and run `make quickstart` in it",
        )
    return subprocess.run([sys.executable, str(top / SCRIPT), *argv]).returncode
