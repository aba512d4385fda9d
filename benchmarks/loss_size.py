"""The loss alone, by its size: tiles against whole score matrices, and how time and memory grow."""

import math
from collections.abc import Callable, Sequence

from benchmarks.comparisons import (
    Budget,
    Finding,
    Setting,
    loss_finding,
    memory_findings,
    ours,
    speed_finding,
)
from benchmarks.measure import Measured, run_interleaved

HEADS_SIZE = {"num_queries": 16, "num_passages": 128, "query_rows": 32, "passage_rows": 128, "width": 256}
"""Where every curve starts from: three heads."""
CURVES: dict[str, tuple[int, ...]] = {
    "num_queries": (16, 32, 64, 128),
    "num_passages": (128, 256, 512, 1024),
    "passage_rows": (128, 256, 512, 1024),
    "world_size": (1, 2, 4),
}
"""What grows, and through which values; the ranks each bring as much as the first one has."""
EXPECTED = {
    "num_queries": "1: every query row meets every passage row",
    "num_passages": "1",
    "passage_rows": "1",
    "world_size": "at most 1: all ranks' queries meet this rank's passages, and only that product grows",
}
"""The slope of time in the logarithm of both. Memory grows by inputs' gradients and winners, which are linear
at most; a product of all rows with all rows would make no difference to these slopes but to the memory
itself."""


def tiled_loss(repeats: int) -> list[Setting]:
    """The loss in tiles: equal to the whole one where that fits, and 65 536 queries × 65 536 passages."""
    dense = {
        "num_queries": 4096,
        "num_passages": 4096,
        "query_rows": 0,
        "passage_rows": 0,
        "width": 256,
        "heads": "dense",
    }
    three = {
        "num_queries": 128,
        "num_passages": 1024,
        "query_rows": 16,
        "passage_rows": 64,
        "width": 128,
        "distill": True,
    }
    settings = []
    for name, size in (
        ("dense head, 4096 × 4096", dense),
        ("three heads and self-distillation, 128 × 1024", three),
    ):
        sides = [ours("tiled", "loss", {**size, "tiles": True}), ours("whole", "loss", size)]
        tiled, whole = measured = run_interleaved(f"tiled-{size['num_queries']}", sides, min(3, repeats))
        findings = speed_finding(f"tiled / whole loss, {name}: time", tiled, whole, None)
        findings += memory_findings(f"tiled / whole loss, {name}", tiled, whole, None)
        findings += loss_finding(f"tiled / whole loss, {name}", tiled, whole) + _gradient_finding(
            name, tiled, whole
        )
        settings.append(Setting(name, 0, measured, findings))
    large = {**dense, "num_queries": 65_536, "num_passages": 65_536, "tiles": True}
    (alone,) = run_interleaved("tiled-65536", [ours("tiled", "loss", large)], 1, warmups=0)
    peak = alone.peak_rss_bytes / 2**30
    finding = Finding(
        "dense loss of 65 536 × 65 536: peak memory of the process in GiB",
        peak,
        f"{peak:.2f}",
        Budget("<=", 2),
    )
    note = "One whole score matrix of it takes 16 GiB."
    return [*settings, Setting("dense head, 65 536 × 65 536, width 256", 0, [alone], [finding], note)]


def _gradient_finding(name: str, first: Measured, second: Measured) -> list[Finding]:
    if first.death or second.death:
        return []
    pairs = [(a["gradient_norms"], b["gradient_norms"]) for a, b in zip(first.samples, second.samples)]
    worst = max(abs(a[leaf] - b[leaf]) / max(a[leaf], b[leaf]) for a, b in pairs for leaf in a)
    what = f"tiled / whole loss, {name}: largest relative difference of the losses' gradient norms"
    return [Finding(what, worst, f"{worst:.1e}", Budget("<=", 1e-4))]


def scaling(repeats: int) -> list[Setting]:
    """Time and memory of the three heads' scores and losses, forward and backward, against queries, passages,
    their length, and ranks."""
    return [_curve(grows, values, min(3, repeats)) for grows, values in CURVES.items()]


def _curve(grows: str, values: tuple[int, ...], repeats: int) -> Setting:
    specs = [{**HEADS_SIZE, "threads": 1, grows: value} for value in values]
    sides = [ours(f"{grows}={value}", "loss", spec) for value, spec in zip(values, specs)]
    measured = run_interleaved(f"scaling-{grows}", sides, repeats, one_at_a_time=True)
    if any(side.death for side in measured):
        return Setting(f"growing {grows}", 0, measured)
    seconds = slope(values, [side.median("cpu_seconds") for side in measured])
    memory = slope(values, [side.step_memory_bytes for side in measured])
    findings = [
        Finding(
            f"loss over {grows}: slope of CPU time (expected {EXPECTED[grows]})",
            seconds,
            f"{seconds:.2f}",
            Budget("<=", 1.15),
        ),
        Finding(
            f"loss over {grows}: slope of memory beyond the inputs (at most 1)",
            memory,
            f"{memory:.2f}",
            Budget("<=", 1.15),
        ),
    ]
    base = ", ".join(f"{key} {value}" for key, value in HEADS_SIZE.items() if key != grows)
    return Setting(
        f"growing {grows}",
        0,
        measured,
        findings,
        f"One thread a rank; {base}. With ranks: time and memory of rank 0.",
    )


def slope(sizes: Sequence[float], figures: Sequence[float]) -> float:
    """Least-squares slope of log(figure) over log(size): 1 for what grows in proportion, 2 for what grows
    with the square."""
    x, y = [math.log(size) for size in sizes], [math.log(figure) for figure in figures]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


LOSS_COMPARISONS: dict[str, Callable[[int], Sequence[Setting]]] = {
    "tiled_loss": tiled_loss,
    "scaling": scaling,
}
"""By name; both run only when they are named: they show bounds and slopes, and compare with no peer."""
