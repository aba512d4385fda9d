"""Numbers of a run for machines: one JSON line a step in `metrics.jsonl`, and TensorBoard. The only file that
knows TensorBoard."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from torch.utils.tensorboard import SummaryWriter

from megam3.errors import REFUSALS
from megam3.files import atomic_file, parse_json
from megam3.obs.trackers import Trackers


def metrics_line(step: int, values: Mapping[str, float]) -> str:
    """One strict JSON line; a value JSON has no word for becomes null and is spelled out under `nonfinite`.

    >>> metrics_line(3, {"loss": float("nan"), "lr": 0.5})
    '{"step": 3, "loss": null, "lr": 0.5, "nonfinite": {"loss": "nan"}}'
    """
    numbers = {name: float(value) for name, value in values.items()}
    row: dict[str, object] = {"step": step}
    row.update((name, value if math.isfinite(value) else None) for name, value in numbers.items())
    odd = {name: str(value) for name, value in numbers.items() if not math.isfinite(value)}
    if odd:
        row["nonfinite"] = odd
    return json.dumps(row, allow_nan=False)


def read_metrics(path: str | Path) -> list[dict[str, object]]:
    """Rows of a `metrics.jsonl`; lines that are none, such as a last one cut short by a killed run, are left
    out."""
    rows = []
    # bytes that are no UTF-8, as a damaged disk leaves them, spoil their own line only
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _drop_after(path: Path, step: int) -> None:
    """Rewrite `path` without rows after `step` (and without a torn last line); the old file stays until the
    new one is whole."""
    rows = [row for row in read_metrics(path) if int(str(row["step"])) <= step]
    with atomic_file(path, "w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


class MetricsWriter:
    """Appends to `run_dir/metrics.jsonl` and `run_dir/tensorboard`; a context manager. Inactive, it does
    nothing.

    `start_step` is the last step already in the checkpoint the run continues from: rows after it came from
    steps that are taken again and are removed, so that no step is there twice.
    """

    def __init__(self, run_dir: str | Path, start_step: int = 0, *, active: bool = True):
        self._active = active
        if not active:
            return
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        if path.exists():
            _drop_after(path, start_step)
        self._file = path.open("a", encoding="utf-8")
        self._trackers = Trackers(run_dir, start_step)
        self._hook_before, threading.excepthook = threading.excepthook, self._spare_refusals
        self._tensorboard = SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step + 1)

    def _spare_refusals(self, failed: threading.ExceptHookArgs) -> None:
        """TensorBoard writes in a thread of its own and raises its error again in our next call: a full disk
        is told from there, as what it is, and not as the thread's traceback as well."""
        is_theirs = type(failed.thread).__module__.startswith("tensorboard.")
        if not (is_theirs and isinstance(failed.exc_value, OSError) and failed.exc_value.errno in REFUSALS):
            self._hook_before(failed)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record `values` of `step`; the line is on its way to the disk when this returns."""
        if not self._active:
            return
        self._file.write(metrics_line(step, values) + "\n")
        self._file.flush()
        self._trackers.write(step, values)
        for name, value in values.items():
            self._tensorboard.add_scalar(name, float(value), step)

    def flush(self) -> None:
        """Bring everything written so far to the disk, so that a killed run can continue from here without a
        gap."""
        if self._active:
            self._file.flush()
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close both."""
        if self._active:
            self._file.close()
            try:
                self._tensorboard.close()
            finally:
                threading.excepthook = self._hook_before
                self._trackers.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
