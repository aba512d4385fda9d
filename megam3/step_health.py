"""Trouble in the figures of a step, acted on while the loop runs: losses that are not finite or jump, steps
that loss scaling skipped, ranks that are slow."""

import json
import logging
import os
import shlex

from megam3.checkpoint import list_steps
from megam3.data.trace import RowsServed, rows_of_step
from megam3.dist import comm
from megam3.engine.deepspeed import UpdateResult
from megam3.obs.alarms import SpikeAlarm, Straggler, StragglerWatch
from megam3.obs.nonfinite import NonfiniteWatch
from megam3.step import Run, StepReport

logger = logging.getLogger(__name__)

SPIKES_FILE = "spikes.jsonl"
SPIKES_KEPT = 50
"""Of one start of a run: a batch of the published recipe has 67 200 rows, half a megabyte of this file, and a
run that diverges has a spike every step."""

ROWS_SHOWN = 5
"""In the log; the file has all."""


class StepHealth:
    """Watches losses, skipped steps and slow ranks of a run."""

    def __init__(self, run: Run):
        engine = run.config.engine
        self.overflows = run.state.overflows
        """Steps that loss scaling skipped since the run began."""
        self._run, self._spikes, self._times = run, SpikeAlarm(), StragglerWatch()
        self._num_spikes = 0
        self._nonfinite = NonfiniteWatch(
            engine.on_nonfinite, engine.max_skipped_steps, lambda: list_steps(run.run_dir), comm.is_main()
        )

    def check(self, report: StepReport, update: UpdateResult, step: int) -> None:
        """Act on the step after `step` done ones.

        Raises:
            TrainingError, RollBack: see `NonfiniteWatch.check`.
        """
        self._times.add(report.seconds_by_part)
        if update.overflowed and not report.nonfinite:
            self.overflows += 1
            if comm.is_main():
                logger.info(
                    "step %d overflowed fp16 at loss scale %g: skipped, the scale is halved (%d so far)",
                    step + 1,
                    update.loss_scale,
                    self.overflows,
                )
            return
        self._nonfinite.check(update.skipped, report.nonfinite, step)
        said = self._spikes.check(report.figures.get("loss/total", float("nan")))
        if said is not None and comm.is_main():
            self._report_spike(step, said)

    def stragglers(self) -> list[Straggler]:
        """Ranks that the others waited for lately; said by the main rank alone."""
        return self._times.read() if comm.is_main() else []

    def _report_spike(self, step: int, said: str) -> None:
        """Name the rows of the step after `step` done ones: some in the log, all in a file; main rank only.

        The plan is a pure function, so one rank knows what all ranks were given.
        """
        run = self._run
        batches = rows_of_step(run.data, step, run.state.skipped)
        logger.warning("step %d: %s; its rows: %s", step + 1, said, "; ".join(map(describe_rows, batches)))
        recipe = shlex.quote(os.path.join(run.run_dir, "recipe.yaml"))
        logger.warning("step %d: see them with `megam3 inspect-batch %s --step %d`", step + 1, recipe, step)
        self._num_spikes += 1
        if self._num_spikes > SPIKES_KEPT:
            return
        line = {"step": step + 1, "said": said, "batches": [batch.as_json() for batch in batches]}
        path = os.path.join(run.run_dir, SPIKES_FILE)
        try:
            with open(path, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        except OSError as error:
            # a diagnosis is no reason to end a run
            logger.warning("%s cannot be written (%s)", path, error)


def describe_rows(batch: RowsServed) -> str:
    """`batch 40 of epoch 0, pairs: rows 17, 3, 22, 9, 4 and 27 more`."""
    parts = []
    for name, rows in batch.rows_by_dataset.items():
        shown = ", ".join(map(str, rows[:ROWS_SHOWN]))
        more = f" and {len(rows) - ROWS_SHOWN} more" if len(rows) > ROWS_SHOWN else ""
        parts.append(f"{name}: rows {shown}{more}")
    return f"batch {batch.index} of epoch {batch.epoch}, {', '.join(parts)} ({SPIKES_FILE} has all)"
