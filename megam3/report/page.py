"""The page of one or several runs: what is the same figure of each stands in one chart, one line a run.

Nothing is loaded from anywhere, and the page's own security policy says so; every text from a run folder goes
through `text.safe`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from megam3.data.manifest import Manifest
from megam3.report.chart import NUM_COLOURS, Line, line_chart
from megam3.report.evaluations import evaluation_curves, heat_maps, mode_tables
from megam3.report.examples import examples_html
from megam3.report.matches import MATCH_STYLE
from megam3.report.record import Point, RunRecord, flatten
from megam3.report.style import STYLE
from megam3.report.text import figure, safe, table

_SECTIONS = {
    "loss": "Losses",
    "accuracy": "Accuracy in the batch",
    "optim": "Gradient norm and learning rate",
    "speed": "Throughput",
    "memory": "Memory over steps",
    "data": "What the batches held",
}
"""By the first part of a metric's name; the others, such as lexical/, are figures of single heads."""
_OTHER = "Heads"
_SHARES = ("accuracy",)
_LOGARITHMIC = ("loss/", "optim/grad_norm")
_GIB = 2**30
LANGUAGES_SHOWN = 30


def page(runs: Sequence[RunRecord]) -> str:
    """The whole HTML document."""
    title = safe(", ".join(run.name for run in runs))
    sections = [
        ("Runs", _overview(runs)),
        ("Retrieval modes against BM25", mode_tables(runs)),
        ("Modes by language", heat_maps(runs, "language")),
        ("Modes by length of the query", heat_maps(runs, "query_length")),
        ("Modes by length of the longest relevant passage", heat_maps(runs, "length")),
        ("Example queries", _examples(runs)),
        ("Evaluation over time", evaluation_curves(runs)),
        *_curves(runs),
        ("Memory planned and measured", _memory(runs)),
        ("Languages and lengths of the data", _mixes(runs)),
        ("Recipe fields that differ", _differences(runs)),
        ("Recipe and environment", _recipes(runs)),
    ]
    body = "\n".join(
        f"<section><h2>{safe(name)}</h2>{content}</section>" for name, content in sections if content
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{MATCH_STYLE}</style></head>\n"
        f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
    )


def _overview(runs: Sequence[RunRecord]) -> str:
    head = ["run", "steps", "last loss", "last accuracy", "tokens/s (median)", "share of peak (median)"]
    rows = [
        [
            f'<span class="key-{index % NUM_COLOURS}">{safe(run.name)}</span>',
            f"{run.last_step:,}",
            _last(run, "loss/total"),
            _last(run, "accuracy/sum"),
            _median(run, "speed/tokens_per_second"),
            _median(run, "speed/matmul_peak_share", as_percent=True),
        ]
        for index, run in enumerate(runs)
    ]
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    notes += [
        f"{run.name}: figures left out because they are no finite numbers: {run.num_nonfinite}"
        for run in runs
        if run.num_nonfinite
    ]
    return table(head, rows) + "".join(f'<p class="note">{safe(note)}</p>' for note in notes)


def _examples(runs: Sequence[RunRecord]) -> str:
    """Of each run; one run's without its name."""
    parts = [(run.name, examples_html(run.examples)) for run in runs if run.examples]
    return "".join(f"<h3>{safe(name)}</h3>{html}" if len(runs) > 1 else html for name, html in parts)


def _last(run: RunRecord, name: str) -> str:
    points = run.series.get(name)
    return figure(points[-1].value) if points else "–"


def _median(run: RunRecord, name: str, *, as_percent: bool = False) -> str:
    """The median, since the first steps of a run are far slower than the others."""
    values = sorted(point.value for point in run.series.get(name, []))
    if not values:
        return "–"
    middle = values[len(values) // 2]
    return f"{middle:.1%}" if as_percent else figure(middle)


def _curves(runs: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    """(section, charts): one chart a metric, in the order in which the runs log them."""
    names = dict.fromkeys(name for run in runs for name in run.series)
    order = [*_SECTIONS.values(), _OTHER]
    ranked = sorted(names, key=lambda name: order.index(_section_of(name)))
    for section, members in groupby(ranked, key=_section_of):
        charts = "".join(_metric_chart(runs, name) for name in members)
        yield section, f'<div class="charts">{charts}</div>'


def _section_of(name: str) -> str:
    return _SECTIONS.get(name.partition("/")[0], _OTHER)


def _metric_chart(runs: Sequence[RunRecord], name: str) -> str:
    in_gib = name.endswith("_bytes")
    lines = [
        Line(
            run.name,
            index,
            [Point(p.step, p.value / _GIB if in_gib else p.value) for p in run.series.get(name, [])],
        )
        for index, run in enumerate(runs)
    ]
    return line_chart(
        f"{name.removesuffix('_bytes')} (GiB)" if in_gib else name,
        lines,
        bounds=(0.0, 1.0) if name.startswith(_SHARES) else None,
        may_be_log=name.startswith(_LOGARITHMIC),
    )


def _memory(runs: Sequence[RunRecord]) -> str:
    """GiB of one rank: what the log measured and planned, and the components of the plan."""
    known = [(run, run.memory) for run in runs if run.memory]
    if not known:
        return ""
    rows = [
        ["measured", *(f"{memory.measured:.2f} ({safe(memory.what)})" for _, memory in known)],
        ["planned for the same steps", *(_gib(memory.planned) for _, memory in known)],
        ["planned for the heaviest step", *(_gib(memory.planned_most) for _, memory in known)],
    ]
    for part in dict.fromkeys(part for _, memory in known for part in memory.parts):
        cells = [f"{memory.parts[part]:.2f}" if part in memory.parts else "–" for _, memory in known]
        rows.append([f"of the heaviest: {safe(part)}", *cells])
    return table(["GiB of one rank", *(safe(run.name) for run, _ in known)], rows)


def _gib(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _mixes(runs: Sequence[RunRecord]) -> str:
    """Of each store once: runs often share one."""
    manifests = {manifest.fingerprint: manifest for run in runs for manifest in run.manifests}
    return "".join(_mix(manifest) for manifest in manifests.values())


def _mix(manifest: Manifest) -> str:
    totals = manifest.totals
    ranked = sorted(manifest.per_language.items(), key=lambda item: -item[1].rows)
    languages = [(name, counts.rows) for name, counts in ranked[:LANGUAGES_SHOWN]]
    if rest := ranked[LANGUAGES_SHOWN:]:
        languages.append((f"{len(rest)} others", sum(counts.rows for _, counts in rest)))
    lengths = [(f"≤ {edge:,} tokens", rows) for edge, rows in manifest.length_histogram if rows]
    return (
        f"<h3>{safe(manifest.name)}: {totals.rows:,} records, {totals.tokens:,} tokens, "
        f"{totals.truncated:,} texts cut, {totals.rejected:,} records rejected</h3>"
        f"{_bars('language', languages)}{_bars('longest text of a record', lengths)}"
    )


def _bars(what: str, counts: Sequence[tuple[str, int]]) -> str:
    most = max((count for _, count in counts), default=0) or 1
    rows = [
        [safe(name), f"{count:,}", f'<span class="bar" style="width:{100 * count / most:.1f}%"></span>']
        for name, count in counts
    ]
    return table([what, "records", ""], rows, kind="mix")


def _differences(runs: Sequence[RunRecord]) -> str:
    """Fields that are not the same in all recipes; nothing for one run."""
    recipes = [flatten(run.recipe) for run in runs]
    fields = dict.fromkeys(name for recipe in recipes for name in recipe)
    rows = []
    for name in fields:
        values = [str(recipe.get(name, "–")) for recipe in recipes]
        if len(set(values)) > 1:
            rows.append([safe(name), *(safe(value) for value in values)])
    return table(["field", *(safe(run.name) for run in runs)], rows) if rows else ""


def _recipes(runs: Sequence[RunRecord]) -> str:
    parts = []
    for run in runs:
        rows = [[safe(name), safe(value)] for name, value in flatten(run.environment).items()]
        environment = table(["environment", ""], rows) if rows else ""
        parts.append(
            f"<details><summary>{safe(run.name)} ({safe(run.folder)})</summary>{environment}"
            f"<pre>{safe(run.recipe_text)}</pre></details>"
        )
    return "".join(parts)
