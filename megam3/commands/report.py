"""`megam3 report RUN [RUN…]`: one HTML page about a run, or about several side by side.

    megam3 report runs/one                            writes runs/one/report.html
    megam3 report runs/one runs/two --out both.html
    megam3 report runs/one --examples model           with queries of its test set as this model answers them

The page needs no network and no other file; it may be written while a run is still training.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from megam3.errors import ConfigError
from megam3.files import atomic_file
from megam3.model.folder import model_folder
from megam3.report.examples import find_examples, write_examples
from megam3.report.page import page
from megam3.report.record import RunRecord, read_run

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
    parser.add_argument(
        "--examples", default=None, metavar="MODEL", help="exported model to answer example queries with"
    )
    parser.add_argument(
        "--test-set",
        default=None,
        metavar="FOLDER",
        help="BEIR folder of the queries and passages (default: the recipe's first evaluation folder)",
    )
    parser.add_argument("--queries", type=int, default=6, help="example queries (default: %(default)s)")
    parser.add_argument("--top", type=int, default=3, help="passages of each mode (default: %(default)s)")
    parser.add_argument("--device", default=None, help="of --examples (default: CUDA when there is one)")
    given = parser.parse_args(argv)
    if given.examples is not None:
        _search_examples(given)
    runs = [read_run(folder) for folder in given.runs]
    out = Path(given.out).expanduser() if given.out else runs[0].folder / PAGE_FILE
    write_page(out, page(runs))
    print(out)
    return 0


def _search_examples(given: argparse.Namespace) -> None:
    """Write the examples of the first run into its folder, where every later page finds them.

    Raises:
        UserError: no test set, or of the model or the test set.
    """
    run = read_run(given.runs[0])
    test_set = given.test_set or next(iter(_test_sets(run)), None)
    if test_set is None:
        rule = "is not named, and the run's recipe has no evaluation.folders"
        raise ConfigError("--test-set", None, rule, "give a folder in BEIR format")
    examples = find_examples(
        model_folder(given.examples),
        test_set,
        run.folder,
        num_queries=given.queries,
        num_hits=given.top,
        device=given.device,
    )
    write_examples(run.folder, examples)


def _test_sets(run: RunRecord) -> list[str]:
    evaluation = run.recipe.get("evaluation")
    folders = evaluation.get("folders") if isinstance(evaluation, dict) else None
    return [str(folder) for folder in folders] if isinstance(folders, list) else []


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
