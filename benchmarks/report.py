"""Write what was measured: a Markdown page (summary first, then every side's figures) and the raw samples as
JSON, which plot.py draws."""

import json
import math
from dataclasses import asdict
from pathlib import Path

from benchmarks.comparisons import Finding, Setting
from benchmarks.measure import Measured


def write_report(folder: Path, results: dict[str, list[Setting]], machine: str) -> str:
    """results.md and results.json in `folder`; returns the Markdown."""
    findings = [
        finding for settings in results.values() for setting in settings for finding in setting.findings
    ]
    lines = [
        "# Benchmarks",
        "",
        f"Measured on {machine}. Sides alternate; a ratio is the median (lowest–highest) over rounds.",
        "",
    ]
    lines += [
        "| what | measured | budget | kept |",
        "|---|---|---|---|",
        *(_finding_line(f) for f in findings),
        "",
    ]
    for name, settings in results.items():
        lines += [f"## {name}", ""]
        for setting in settings:
            lines += _setting_lines(setting)
    text = "\n".join(lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.md").write_text(text, encoding="utf-8")
    (folder / "results.json").write_text(json.dumps(_raw(results, machine), indent=1), encoding="utf-8")
    return text


def _finding_line(finding: Finding) -> str:
    if finding.budget is None:
        return f"| {finding.what} | {finding.text} | | |"
    kept = "yes" if finding.budget.met(finding.value) else "NO"
    return f"| {finding.what} | {finding.text} | {finding.budget} | {kept} |"


def _setting_lines(setting: Setting) -> list[str]:
    lines = [f"{setting.name}" + (f", {setting.num_tokens} tokens a step" if setting.num_tokens else ""), ""]
    lines += [
        "| side | s a step (range) | tokens/s | peak RSS, MiB | beyond the loaded model, MiB |"
        " loss of the first kept step |"
    ]
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
        f"| {measured.side.name} | {median:.3f} ({min(seconds):.3f}–{max(seconds):.3f}) |"
        f" {speed} | {measured.peak_rss_bytes >> 20} "
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
                    "findings": [
                        {
                            "what": f.what,
                            "value": None if math.isnan(f.value) else f.value,
                            "budget": str(f.budget or ""),
                        }
                        for f in setting.findings
                    ],
                    "sides": [side(measured) for measured in setting.measured],
                }
                for setting in settings
            ]
            for name, settings in results.items()
        },
    }
