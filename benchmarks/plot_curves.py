"""Draw the curves of `python -m benchmarks scaling` as scaling.png: time and memory over each size, with
lines of slope 1."""

import statistics
from pathlib import Path

from matplotlib import pyplot


def draw_curves(file: Path, settings: list[dict]) -> None:
    """Both axes logarithmic, one column per size that grows; dotted: proportional growth from the first
    point.

    settings: of the comparison `scaling` in results.json; sides are named SIZE=VALUE.
    """
    figure, axes = pyplot.subplots(2, len(settings), figsize=(3.2 * len(settings), 6), squeeze=False)
    for column, setting in enumerate(settings):
        sides = [side for side in setting["sides"] if side["samples"]]
        grows = setting["setting"].removeprefix("growing ")
        values = [int(side["name"].rpartition("=")[2]) for side in sides]
        seconds = [statistics.median(sample["cpu_seconds"] for sample in side["samples"]) for side in sides]
        memory = [
            (max(s["peak_rss_bytes"] for s in side["samples"]) - side["idle_rss_bytes"]) / 2**20
            for side in sides
        ]
        for row, (figures, what) in enumerate(
            ((seconds, "CPU seconds of rank 0"), (memory, "MiB beyond the inputs"))
        ):
            place = axes[row][column]
            place.loglog(values, figures, marker="o", base=2)
            place.loglog(
                values,
                [figures[0] * value / values[0] for value in values],
                linestyle=":",
                color="grey",
                base=2,
            )
            place.set_xlabel(grows)
            place.set_ylabel(what)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
