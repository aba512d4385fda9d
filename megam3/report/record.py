"""A run folder read for a report: metrics, evaluations, memory, data mix, recipe, environment.

A run that was killed or never evaluated lacks some of it. What is missing or unreadable becomes a note on
the page instead of an error; only a folder without any figure is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megam3.config import recipe_yaml
from megam3.data.manifest import Manifest
from megam3.data.store import dataset_folder
from megam3.errors import DataError, UserError
from megam3.files import read_json
from megam3.obs.metrics import read_metrics
from megam3.report.examples import Example, read_examples
from megam3.retrieval.results import EvaluationResult, read_result

_MEMORY = re.compile(
    r"peak memory after (?P<steps>\d+) steps: (?P<measured>[\d.]+) GiB \((?P<what>[^)]*)\)"
    r"(?:; planned (?P<planned>[\d.]+) GiB(?: for them, (?P<most>[\d.]+) GiB at most)?)?"
)
_PART = re.compile(r" INFO   (?P<name>\S.*?) +(?P<gib>\d+\.\d+)$")
_EVALUATION = re.compile(r"step-(\d+)-.+\.json")


@dataclass(frozen=True)
class Point:
    """A figure of a step."""

    step: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Of one rank, in GiB; what the log says, of the last start of the run."""

    steps: int
    measured: float
    what: str
    """What was measured: a device's allocations, or the process without what it held before its model."""
    planned: float | None
    """For the steps that were measured; in logs of older releases for the longest texts allowed."""
    planned_most: float | None
    """For the heaviest step that the data can make."""
    parts: dict[str, float]
    """The plan of the heaviest step by component; empty where none was counted."""


@dataclass(frozen=True)
class Evaluation:
    """One file of RUN/eval; `step` is None for one written after the run, without a step in its name."""

    step: int | None
    result: EvaluationResult


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything a page says of one run."""

    name: str
    folder: Path
    series: dict[str, list[Point]]
    """By the names of metrics.jsonl, ascending in step; without `eval/`: `evaluations` holds more."""
    num_nonfinite: int
    evaluations: list[Evaluation]
    """Ascending in step; those without a step last."""
    memory: Memory | None
    manifests: list[Manifest]
    recipe_text: str
    recipe: Mapping[str, Any]
    environment: Mapping[str, Any]
    examples: list[Example] = field(default_factory=list)
    """Queries with what a model found; empty until `megam3 report --examples` was asked for them."""
    notes: list[str] = field(default_factory=list)
    """What is missing or cannot be read."""

    @property
    def last_step(self) -> int:
        """The newest step with a figure; 0 without any."""
        return max((points[-1].step for points in self.series.values()), default=0)


def read_run(folder: str | Path) -> RunRecord:
    """Read a run folder.

    Raises:
        DataError: there is no such folder, or it holds neither metrics nor evaluations.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        remedy = "name the folder of a run, which is output_dir/name of its recipe"
        raise DataError("run folder", str(folder), "is not a folder", remedy)
    notes: list[str] = []
    series, num_nonfinite = _series(folder / "metrics.jsonl", notes)
    evaluations = sorted(_evaluations(folder / "eval", notes), key=_by_step)
    if not series and not evaluations:
        rule = "holds no figures: neither rows in metrics.jsonl nor files in eval/"
        remedy = "wait for the run's first step, or name another folder"
        raise DataError("run folder", str(folder), rule, remedy)
    recipe_text = _read_text(folder / "recipe.yaml", notes)
    recipe = _recipe(recipe_text, folder / "recipe.yaml", notes)
    return RunRecord(
        name=str(recipe.get("name") or folder.resolve().name),
        folder=folder,
        series=series,
        num_nonfinite=num_nonfinite,
        evaluations=evaluations,
        memory=_memory(_read_text(folder / "log.txt", notes)),
        manifests=list(_manifests(recipe, folder, notes)),
        recipe_text=recipe_text,
        recipe=recipe,
        environment=_environment(folder / "env.json", notes),
        examples=read_examples(folder, notes),
        notes=notes,
    )


def flatten(value: object, path: str = "") -> dict[str, object]:
    """A recipe as one value a dotted field.

    >>> flatten({"optim": {"lr": 0.1}, "paths": ["a", "b"]})
    {'optim.lr': 0.1, 'paths.0': 'a', 'paths.1': 'b'}
    """
    if isinstance(value, Mapping):
        children = [(str(key), child) for key, child in value.items()]
    elif isinstance(value, list):
        children = [(str(index), child) for index, child in enumerate(value)]
    else:
        return {path: value}
    return {
        name: leaf
        for key, child in children
        for name, leaf in flatten(child, f"{path}.{key}" if path else key).items()
    }


def _series(path: Path, notes: list[str]) -> tuple[dict[str, list[Point]], int]:
    """The figures of metrics.jsonl by name, and how many were no finite number."""
    try:
        rows = read_metrics(path)
    except OSError as error:
        notes.append(f"{path.name}: {error.strerror}")
        return {}, 0
    series: dict[str, dict[int, float]] = {}
    num_nonfinite = 0
    for row in rows:
        odd = row.get("nonfinite")
        num_nonfinite += len(odd) if isinstance(odd, dict) else 0
        for name, value in row.items():
            is_figure = (
                isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            )
            if is_figure and name != "step" and not name.startswith("eval/"):
                # of a step written twice, as after a kill, the later row is the one that counts
                series.setdefault(name, {})[int(str(row["step"]))] = float(str(value))
    return {
        name: [Point(step, value) for step, value in sorted(of_name.items())]
        for name, of_name in series.items()
    }, num_nonfinite


def _evaluations(folder: Path, notes: list[str]) -> Iterator[Evaluation]:
    for path in sorted(folder.glob("*.json")):
        named = _EVALUATION.fullmatch(path.name)
        try:
            yield Evaluation(int(named[1]) if named else None, read_result(path))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"eval/{path.name}: not an evaluation ({error})")


def _by_step(evaluation: Evaluation) -> float:
    return math.inf if evaluation.step is None else evaluation.step


def _memory(log: str) -> Memory | None:
    """What log.txt says of memory; a run that continued says it again, and the last one holds."""
    found = [*_MEMORY.finditer(log)]
    if not found:
        return None
    last = found[-1]
    head, marker, plan = log[: last.start()].rpartition("Memory of one of ")
    parts = {}
    for line in plan.splitlines() if marker else []:
        if (part := _PART.search(line)) and "peak" not in parts:
            parts[part["name"]] = float(part["gib"])
    return Memory(
        steps=int(last["steps"]),
        measured=float(last["measured"]),
        what=last["what"],
        planned=float(last["planned"]) if last["planned"] else None,
        planned_most=float(last["most"]) if last["most"] else None,
        parts=parts,
    )


def _recipe(text: str, path: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        data = recipe_yaml.parse(text, str(path)).data
    except UserError as error:
        notes.append(f"recipe.yaml: {error}")
        return {}
    return data if isinstance(data, dict) else {}


def _manifests(recipe: Mapping[str, Any], folder: Path, notes: list[str]) -> Iterator[Manifest]:
    """Of the datasets the recipe names; the store may be gone, or on another machine."""
    data = recipe.get("data")
    data = data if isinstance(data, dict) else {}
    store = Path(str(data.get("store_dir") or folder / "store"))
    datasets: Sequence[object] = data.get("train") or []
    for name in [
        str(dataset["name"]) for dataset in datasets if isinstance(dataset, dict) and "name" in dataset
    ]:
        try:
            path = dataset_folder(store, name) / "manifest.json"
            manifest = Manifest.read(path)
        except DataError as error:
            notes.append(f"data mix of {name}: {error}")
            continue
        if manifest is None:
            notes.append(f"data mix of {name}: there is no {path}")
        else:
            yield manifest


def _environment(path: Path, notes: list[str]) -> Mapping[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        notes.append(f"{path.name}: cannot be read ({error})")
        return {}
    return found if isinstance(found, dict) else {}


def _read_text(path: Path, notes: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        notes.append(f"{path.name}: {error.strerror}")
        return ""
