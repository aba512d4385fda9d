"""`megam3 report RUN [RUN…]`: one HTML page about a run, or about several side by side.

    megam3 report runs/one                            writes runs/one/report.html
    megam3 report runs/one runs/two --out both.html

The page needs no network and no other file; it may be written while a run is still training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megam3.errors import ConfigError
from megam3.files import atomic_file
from megam3.report.page import page
from megam3.report.record import read_run

PAGE_FILE = "report.html"


def main(argv: Sequence[str]) -> int:
    """Write the page, and say where it lies.

    Raises:
        DataError: a run folder that is none or holds no figures.
        ConfigError: the page cannot be written there.
    """
    parser = argparse.ArgumentParser(
        prog="megam3 report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of runs: output_dir/name of a recipe")
    parser.add_argument("--out", default=None, help=f"file to write (default: {PAGE_FILE} in the first RUN)")
    given = parser.parse_args(argv)
    runs = [read_run(folder) for folder in given.runs]
    out = Path(given.out).expanduser() if given.out else runs[0].folder / PAGE_FILE
    write_page(out, page(runs))
    print(out)
    return 0


def write_page(out: Path, html: str) -> None:
    """Write the page whole or not at all.

    Raises:
        ConfigError: the folder is not there or not writable, or `out` is a folder.
    """
    try:
        with atomic_file(out, "w") as stream:
            stream.write(html)
    except OSError as error:
        remedy = "name a file in a folder that exists"
        raise ConfigError("--out", str(out), f"cannot be written ({error.strerror})", remedy) from None
