"""Draw results.json as results.png: each budgeted ratio over its bound."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from benchmarks.plot_curves import draw_curves


def draw(folder: Path) -> None:
    """Bars on a log scale: 1 means exactly kept, and more is better for lower and for upper bounds alike."""
    comparisons = json.loads((folder / "results.json").read_text(encoding="utf-8"))["comparisons"]
    if comparisons.get("scaling"):
        draw_curves(folder / "scaling.png", comparisons["scaling"])
    findings = [f for settings in comparisons.values() for setting in settings for f in setting["findings"]]
    bars = [
        (f["what"], _margin(f))
        for f in findings
        if f["budget"] and f["value"] and f["value"] > 0 and "losses" not in f["what"]
    ]
    figure, axes = pyplot.subplots(figsize=(11, 0.34 * len(bars) + 1.2))
    axes.barh(
        [what for what, _ in bars],
        [m for _, m in bars],
        color=["tab:green" if m >= 1 else "tab:red" for _, m in bars],
    )
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("how far the budget is kept (1 = exactly; more is better)")
    axes.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(folder / "results.png", dpi=130)
    pyplot.close(figure)


def _margin(finding: dict) -> float:
    sign, bound = finding["budget"].split()
    return finding["value"] / float(bound) if sign == "≥" else float(bound) / finding["value"]
