"""The sections about retrieval quality: over time, by mode against BM25, by language."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megam3.report.chart import Line, line_chart
from megam3.report.record import Evaluation, Point, RunRecord
from megam3.report.text import safe, table
from megam3.retrieval.metrics import METRICS


def evaluation_curves(runs: Sequence[RunRecord]) -> str:
    """One chart a run and test set, a line a mode, where there are two steps or more."""
    charts = []
    for run in runs:
        for dataset, found in _by_dataset(run).items():
            timed = [(e.step, e.result) for e in found if e.step is not None]
            if len(timed) < 2:
                continue
            modes = dict.fromkeys(mode for _, result in timed for mode in result.modes)
            lines = [
                Line(
                    mode,
                    index,
                    [
                        Point(step, value)
                        for step, result in timed
                        if mode in result.modes
                        and (value := result.modes[mode].overall.get(METRICS[0])) is not None
                    ],
                )
                for index, mode in enumerate(modes)
            ]
            charts.append(line_chart(f"{run.name}, {dataset}: {METRICS[0]}", lines))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _by_dataset(run: RunRecord) -> dict[str, list[Evaluation]]:
    found: dict[str, list[Evaluation]] = {}
    for evaluation in run.evaluations:
        found.setdefault(evaluation.result.dataset, []).append(evaluation)
    return found


def mode_tables(runs: Sequence[RunRecord]) -> str:
    """Metrics of every mode, and how far each lies above BM25."""
    return _of_newest(runs, _mode_table)


def heat_maps(runs: Sequence[RunRecord], by: str) -> str:
    """Groups as rows, modes as columns, the higher the darker; `by` is language, length or query_length."""
    return _of_newest(runs, lambda evaluation: _heat_map(evaluation, by))


def _of_newest(runs: Sequence[RunRecord], draw: Callable[[Evaluation], str]) -> str:
    """What `draw` makes of the newest evaluation of each test set, under run, test set and step."""
    parts = []
    for run in runs:
        for dataset, found in _by_dataset(run).items():
            newest = found[-1]
            when = "after the run" if newest.step is None else f"step {newest.step:,}"
            size = f"{newest.result.num_queries:,} queries, {newest.result.num_passages:,} passages"
            if drawn := draw(newest):
                parts.append(f"<h3>{safe(run.name)}, {safe(dataset)}, {when} ({size})</h3>{drawn}")
    return "".join(parts)


def _mode_table(evaluation: Evaluation) -> str:
    modes = evaluation.result.modes
    baseline = modes["BM25"].overall.get(METRICS[0]) if "BM25" in modes else None
    rows = []
    for mode, of_mode in modes.items():
        first = of_mode.overall.get(METRICS[0])
        over = "" if first is None or baseline is None or mode == "BM25" else f"{first - baseline:+.3f}"
        rows.append(
            [
                safe(mode),
                *(f"{of_mode.overall[name]:.3f}" if name in of_mode.overall else "–" for name in METRICS),
                over,
            ]
        )
    return table(["mode", *METRICS, f"{METRICS[0]} over BM25"], rows)


def _heat_map(evaluation: Evaluation, by: str) -> str:
    groups = {mode: getattr(of_mode, f"by_{by}") for mode, of_mode in evaluation.result.modes.items()}
    unit = " tokens" if by != "language" else ""
    body = ""
    for name in dict.fromkeys(name for of_mode in groups.values() for name in of_mode):
        each = [of_mode.get(name, {}) for of_mode in groups.values()]
        queries = next((f"{found['queries']:,.0f}" for found in each if "queries" in found), "–")
        cells = [found.get(METRICS[0]) for found in each]
        drawn = "".join(
            "<td>–</td>" if cell is None else f'<td style="--share:{cell:.3f}">{cell:.3f}</td>'
            for cell in cells
        )
        body += f"<tr><td>{safe(name)}{unit} ({queries} queries)</td>{drawn}</tr>"
    head = "".join(f"<th>{safe(cell)}</th>" for cell in [METRICS[0], *groups])
    return f'<div class="scroll"><table class="heat"><tr>{head}</tr>{body}</table></div>' if body else ""
