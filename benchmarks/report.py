"""Write what was measured: a Markdown page (summary first, then every side's figures), the raw samples as JSON, and a plot."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from benchmarks.comparisons import Finding, Setting
from benchmarks.measure import Measured


def write_report(folder: Path, results: dict[str, list[Setting]], machine: str) -> str:
    """results.md, results.json and, where matplotlib is there, results.png in `folder`; returns the Markdown."""
    findings = [finding for settings in results.values() for setting in settings for finding in setting.findings]
    lines = [
        "# Benchmarks",
        "",
        f"Measured on {machine}. Sides alternate; a ratio is the median (lowest–highest) over rounds.",
        "",
    ]
    lines += ["| what | measured | budget | kept |", "|---|---|---|---|", *(_finding_line(f) for f in findings), ""]
    for name, settings in results.items():
        lines += [f"## {name}", ""]
        for setting in settings:
            lines += _setting_lines(setting)
    text = "\n".join(lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(text, encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(_raw(results, machine), indent=1), encoding="utf-8")
    _plot(folder / "results.png", findings)
    return text


def _finding_line(finding: Finding) -> str:
    if finding.budget is None:
        return f"| {finding.what} | {finding.text} | | |"
    kept = "yes" if finding.budget.met(finding.value) else "NO"
    return f"| {finding.what} | {finding.text} | {finding.budget} | {kept} |"


def _setting_lines(setting: Setting) -> list[str]:
    lines = [f"{setting.name}" + (f", {setting.num_tokens} tokens a step" if setting.num_tokens else ""), ""]
    lines += ["| side | s a step (range) | tokens/s | peak RSS, MiB | beyond the loaded model, MiB | loss of the first kept step |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [_side_line(measured, setting.num_tokens) for measured in setting.measured]
    return [*lines, *([setting.note] if setting.note else []), ""]


def _side_line(measured: Measured, num_tokens: int) -> str:
    if measured.death:
        return f"| {measured.side.name} | died: {measured.death[:160]} | | | | |"
    seconds, median = [s["seconds"] for s in measured.samples], measured.median()
    speed = f"{num_tokens / median:.0f}" if num_tokens else ""
    loss = measured.samples[0].get("loss")
    return (
        f"| {measured.side.name} | {median:.3f} ({min(seconds):.3f}–{max(seconds):.3f}) | {speed} | {measured.peak_rss_bytes >> 20} "
        f"| {measured.step_memory_bytes >> 20} | {'' if loss is None else f'{loss:.6f}'} |"
    )


def _raw(results: dict[str, list[Setting]], machine: str) -> dict:
    def side(measured: Measured) -> dict:
        figures = {k: v for k, v in asdict(measured).items() if k != "side"}
        return {"name": measured.side.name, **figures}

    return {
        "machine": machine,
        "comparisons": {
            name: [
                {
                    "setting": setting.name,
                    "num_tokens": setting.num_tokens,
                    "findings": [{"what": f.what, "value": f.value, "budget": str(f.budget or "")} for f in setting.findings],
                    "sides": [side(measured) for measured in setting.measured],
                }
                for setting in settings
            ]
            for name, settings in results.items()
        },
    }


def _plot(file: Path, findings: list[Finding]) -> None:
    """Each finding with a budget as value / bound, on a log scale: bars that reach the line on the right side keep it."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = [f for f in findings if f.budget is not None and not math.isnan(f.value) and f.value > 0]
    figure, axes = pyplot.subplots(figsize=(11, 0.34 * len(drawn) + 1.2))
    # above 1 is better for both kinds of budget
    goodness = [f.value / f.budget.bound if f.budget.sign == ">=" else f.budget.bound / f.value for f in drawn]
    axes.barh([f.what for f in drawn], goodness, color=["tab:green" if g >= 1 else "tab:red" for g in goodness])
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel("how far the budget is kept (1 = exactly; more is better)")
    axes.tick_params(axis="y", labelsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
