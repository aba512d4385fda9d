"""`python -m benchmarks [NAME…] [--repeats N]`: run comparisons, print and write their table.

python -m benchmarks                        all that fit into 20 minutes on two quiet cores
python -m benchmarks packed maxsim          these two
python -m benchmarks long_step  8192-token passages at XLM-R's width and vocabulary; minutes, 12 GB
python -m benchmarks tiled_loss  tiles against whole matrices, and a loss over 65 536 × 65 536; minutes
python -m benchmarks scaling  slopes of the loss's time and memory, with a plot of the curves; minutes
python -m benchmarks gpu  the table of a GPU node, in pieces; `--device cpu --tiny` shows that it runs
"""

import argparse
import os
import sys
import time

from benchmarks.comparisons import COMPARISONS as STEP_COMPARISONS
from benchmarks.comparisons import DEFAULT
from benchmarks.gpu.runner import main as run_gpu
from benchmarks.loss_size import LOSS_COMPARISONS
from benchmarks.measure import RESULTS, machine
from benchmarks.plot import draw
from benchmarks.report import write_report

COMPARISONS = {**STEP_COMPARISONS, **LOSS_COMPARISONS}


def main() -> None:
    """See the module's docstring."""
    if sys.argv[1:2] == ["gpu"]:
        run_gpu(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(COMPARISONS))
    parser.add_argument("--repeats", type=int, default=5, help="kept rounds of each comparison (default 5)")
    parser.add_argument(
        "--threads", type=int, help="threads of each side but the ranks' (default: one a core)"
    )
    arguments = parser.parse_args()
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    unknown = sorted(set(arguments.names) - set(COMPARISONS))
    if unknown:
        parser.error(f"no comparison named {', '.join(unknown)}; there are {', '.join(COMPARISONS)}")
    started, load = time.time(), os.getloadavg()[1]
    results = {}
    for name in arguments.names or DEFAULT:
        print(f"{name}: {COMPARISONS[name].__doc__}", flush=True)
        try:
            results[name] = list(COMPARISONS[name](arguments.repeats))
        except RuntimeError as error:
            print(f"  left out: {error}")
        # after each comparison, so that an interrupted run keeps what it has
        where = (
            f"{machine()} (load average {load:.1f} before the run,"
            f" {(time.time() - started) / 60:.1f} minutes)"
        )
        page = write_report(RESULTS, results, where)
    print(page)
    draw(RESULTS)
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
