"""What a run does between two optimizer steps, besides counting: log, save, evaluate, and watch for trouble.

The loop in `trainer.py` says when; this file says how. Every method is collective unless it says otherwise:
the ranks come here with the same figures, and what one rank alone knows travels in `Wishes`.
"""

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType

from megam3.batch import Batch, Progress, RetrievalBatch
from megam3.checkpoint import CheckpointWriter, Evaluations, Retention, RunState, SaveClock, list_steps
from megam3.dist import comm
from megam3.engine.deepspeed import UpdateResult
from megam3.obs.clock import StepClock, peak_memory_bytes
from megam3.obs.metrics import MetricsWriter
from megam3.obs.progress import TrainingProgress
from megam3.obs.stop import StopSignal
from megam3.step import Run, StepReport, Wishes
from megam3.step_health import StepHealth

logger = logging.getLogger(__name__)

MEMORY_STEPS = 3
"""Steps after which the memory a run holds has been seen: AdamW's moments come in the first, the allocator
settles in the next."""


def checkpoint_writer(run: Run, evaluations: Evaluations) -> CheckpointWriter:
    """Writes the checkpoints of this run as its recipe says; collective."""
    settings = run.config.train

    def retention() -> Retention:
        best = settings.keep_best
        return Retention(
            best_step=None if best is None else evaluations.best_step(best, list_steps(run.run_dir)),
            keep=settings.keep_checkpoints,
            every_steps=settings.keep_every_steps,
            resumed_step=run.state.progress.step or None,
        )

    return CheckpointWriter(
        run.run_dir,
        run.engine.save,
        run.model_files,
        retention,
        fence=run.guard.fence,
        in_background=settings.checkpoint_writing == "async",
    )


class Moments:
    """Log, checkpoints and evaluations of a run from `run.state` on; a context manager.

    Args:
        run: the live objects.
        writer: of its checkpoints (`checkpoint_writer`).
        evaluations: what its evaluations found so far.
        clock: of its steps; the loop lets it wait for batches, this class adds what they held.
    """

    def __init__(self, run: Run, writer: CheckpointWriter, evaluations: Evaluations, clock: StepClock):
        self._run, self._writer, self._evaluations, self._clock = run, writer, evaluations, clock
        self._settings, self._first_step = run.config.train, run.state.progress.step
        self._saves = SaveClock(self._settings.save_every_minutes, self._first_step)
        self._begun_step = self._saved_step = self._first_step or None
        self._planned_bytes = 0
        self.health = StepHealth(run)
        """Asked by the loop after every update."""
        # files and bar belong to the main rank: elsewhere both do nothing
        every, is_main = self._settings.log_every_steps, comm.is_main()
        self._metrics = MetricsWriter(run.run_dir, self._first_step, active=is_main)
        self._bar = TrainingProgress(run.total_steps, self._first_step, every, active=is_main)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Moments":
        with contextlib.ExitStack() as opening:
            opening.enter_context(self._metrics)
            opening.enter_context(self._bar)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def wishes(self, stop: StopSignal) -> Wishes:
        """What this rank wants to happen after the step that it is about to take; not collective."""
        return Wishes(
            requeue=stop.wants_requeue,
            stop=stop.wants_stop,
            save=self._saves.is_due(),
            writing=self._writer.is_writing,
        )

    def begin(self) -> bool:
        """What is due before the first step; returns whether the run has ended already."""
        run, step = self._run, self._first_step
        if self._owes_evaluation(step):
            self._evaluate(step)
        if step < run.total_steps and self._evaluations.end_run(self._settings.early_stopping, step):
            return True
        if run.config.engine.on_nonfinite == "rollback" and self._writer.has_nothing():
            self._save(run.state.progress, wait=True)
        run.guard.progress(step, run.total_steps)
        return False

    def log(
        self, progress: Progress, report: StepReport, update: UpdateResult, batches: Sequence[Batch]
    ) -> None:
        """Count the step that led to `progress`, and write its figures when they are due."""
        run, step = self._run, progress.step
        run.guard.at(step, "log")
        if step <= self._first_step + MEMORY_STEPS:
            self._plan_batches(batches)
        if step == self._first_step + MEMORY_STEPS:
            self._report_memory()
        lengths = [length for batch in batches for length in batch.texts.lengths]
        self._clock.add(report.num_tokens, run.encoder_shape.training_flops(lengths))
        self._bar.update(step, report.figures, report.num_tokens)
        run.guard.progress(step, run.total_steps)
        if not _is_due(step, self._settings.log_every_steps, step == run.total_steps):
            return
        values = self._log_values(report, update)
        self._metrics.write(step, values)
        run.guard.progress(step, run.total_steps, values["speed/tokens_per_second"])
        for warning in run.objective.warnings(values, self._settings.dead_head_share):
            logger.warning("step %d: %s", step, warning)
        for straggler in self.health.stragglers():
            logger.warning("step %d: %s", step, straggler)

    def evaluates_at(self, step: int) -> bool:
        """Whether the recipe wants an evaluation after `step` steps; not collective."""
        every = self._settings.evaluate_every_steps
        return every is not None and step > 0 and _is_due(step, every, step == self._run.total_steps)

    def save(self, progress: Progress, wishes: Wishes, *, leaves: bool, is_evaluated: bool) -> None:
        """Begin a checkpoint when one is due, or name the one in flight once all ranks have written it.

        Args:
            wishes: of all ranks together.
            leaves: the run ends here: save, and wait until the disk has it.
            is_evaluated: an evaluation follows, whose result may make this the best checkpoint.
        """
        step, settings = progress.step, self._settings
        is_asked = wishes.save or (is_evaluated and settings.keep_best is not None)
        if _is_due(step, settings.save_every_steps, leaves or is_asked):
            self._run.guard.at(step, "save")
            with self._bar.paused():
                self._metrics.flush()
                self._save(progress, wait=leaves)
        elif self._writer.is_pending and not wishes.writing:
            self._run.guard.at(step, "save")
            self._finish()

    def evaluate(self, progress: Progress) -> bool:
        """Evaluate; returns whether train.early_stopping ends the run here, saved."""
        step = progress.step
        self._evaluate(step)
        is_last = step == self._run.total_steps
        if is_last or not self._evaluations.end_run(self._settings.early_stopping, step):
            return False
        self._finish()
        if self._saves.step < step:
            self._save(progress, wait=True)
        return True

    def say_end(self, step: int) -> None:
        """Where the run stands as it ends; not collective."""
        said = "already finished:" if self._first_step == self._run.total_steps else "stopped at"
        newest = self._saves.step
        logger.info("%s step %d of %d; newest checkpoint: step %d", said, step, self._run.total_steps, newest)

    def _save(self, progress: Progress, *, wait: bool) -> None:
        self._finish()
        # tokens/s is of steps: a window with a checkpoint in it must not look like a slow one
        with self._clock.paused():
            self._writer.save(self._state(progress), wait=wait)
        self._saves.done(progress.step)
        self._begun_step = progress.step
        self._note_checkpoint()

    def _finish(self) -> None:
        with self._clock.paused():
            self._writer.finish()
        self._note_checkpoint()

    def _note_checkpoint(self) -> None:
        """Tell the heartbeat; a checkpoint that is still being written has no name to go back to."""
        is_writing = self._writer.is_pending
        self._saved_step = self._saved_step if is_writing else self._begun_step
        self._run.guard.checkpoint(self._saved_step, self._begun_step if is_writing else None)

    def _state(self, progress: Progress) -> RunState:
        return replace(self._run.state, progress=progress, overflows=self.health.overflows)

    def _evaluate(self, step: int) -> None:
        self._run.guard.at(step, "evaluate")
        with self._bar.paused(), self._clock.paused():
            figures = self._run.evaluate(step)
            self._metrics.write(step, figures)
            if comm.is_main():
                self._evaluations.add(step, figures)

    def _owes_evaluation(self, step: int) -> bool:
        """Whether a run that was killed in the evaluation after its save has to catch up on it."""
        is_owed = False
        # the main rank alone lists the folder: a thousand ranks would ask a shared file system at once
        if comm.is_main() and self.evaluates_at(step):
            folder = os.path.join(self._run.run_dir, "eval")
            names = os.listdir(folder) if os.path.isdir(folder) else []
            done = [name for name in names if name.startswith(f"step-{step:06d}-")]
            # the files may be an earlier run's, which train.resume=never or train.resume_step left there
            is_missing = len(done) < len(self._run.config.evaluation.folders)
            is_owed = is_missing or step not in self._evaluations
        return comm.any_rank(is_owed)

    def _plan_batches(self, batches: Sequence[Batch]) -> None:
        """Keep the plan of the heaviest batch so far."""
        if self._run.memory_plan is None:
            return
        for batch in batches:
            queries = batch.num_queries if isinstance(batch, RetrievalBatch) else 0
            planned = self._run.memory_plan.bytes_of(batch.texts.lengths, queries)
            self._planned_bytes = max(self._planned_bytes, planned)

    def _report_memory(self) -> None:
        """What these steps held beside what was planned for them, and the most that the data can make of a
        step: a few steps seldom meet it."""
        run, gib = self._run, 2**30
        held = peak_memory_bytes(run.engine.device)
        what = "tensors"
        if run.engine.device.type != "cuda":
            # libraries and the loader's buffers are no part of a plan
            held -= run.bytes_before_model
            what = f"the process, without the {run.bytes_before_model / gib:.2f} GiB before its model"
        planned = ""
        if run.memory_plan is not None:
            most = run.memory_plan.most_bytes
            planned = f"; planned {self._planned_bytes / gib:.2f} GiB for them, {most / gib:.2f} GiB at most"
        logger.info("peak memory after %d steps: %.2f GiB (%s)%s", MEMORY_STEPS, held / gib, what, planned)

    def _log_values(self, report: StepReport, update: UpdateResult) -> dict[str, float]:
        speed = self._clock.read()
        return {
            **report.figures,
            "optim/grad_norm": update.grad_norm,
            "optim/lr": update.lr,
            **({} if update.loss_scale is None else {"optim/loss_scale": update.loss_scale}),
            "speed/tokens_per_second": speed.tokens_per_second,
            "speed/matmul_peak_share": speed.peak_share or 0.0,
            "speed/data_wait_share": speed.data_wait_share,
            "memory/peak_bytes": float(peak_memory_bytes(self._run.engine.device)),
            "data/samples": float(report.num_samples),
            "data/tokens": float(report.num_tokens),
            "data/truncated_texts": float(report.num_truncated),
            "data/padding_avoided_share": 1.0 - report.num_tokens / max(1, report.padded_tokens),
        }


def _is_due(step: int, every_steps: int | None, is_last: bool) -> bool:
    return is_last or (every_steps is not None and step % every_steps == 0)
