"""The training loop. It knows no stage: objectives compute, the engine steps, this file counts, logs,
evaluates, saves and stops.

Everything random in a step is a function of (seed, step, rank), so a resumed run draws what the uninterrupted
one would have drawn.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megam3.batch import Batch, Progress
from megam3.checkpoint import Retention, RunState, list_steps, save_checkpoint
from megam3.config.schema import RunConfig
from megam3.data.dataset import TrainingData
from megam3.data.permute import key_of
from megam3.dist import comm
from megam3.encoders import EncoderShape
from megam3.engine.deepspeed import Engine, UpdateResult
from megam3.errors import TrainingError
from megam3.objectives.base import Objective
from megam3.obs.alarms import SpikeAlarm, Straggler, StragglerWatch
from megam3.obs.clock import StepClock, peak_memory_bytes
from megam3.obs.guard import RunGuard
from megam3.obs.metrics import MetricsWriter
from megam3.obs.progress import TrainingProgress
from megam3.obs.stop import EXIT_REQUEUE, EXIT_STOPPED, StopSignal

logger = logging.getLogger(__name__)

MEMORY_STEPS = 3
"""Steps after which the memory a run holds has been seen: AdamW's moments come in the first, the allocator
settles in the next."""

TIMED_PARTS = ("data", "forward and backward")
"""What of a step is timed on every rank: the wait for its batch, and the processor time of its passes.
By the wall clock a rank that waits for a slower one in a collective call takes as long as that one. On a GPU
processor time says little (launches, and waits that spin): there only the data tell."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The live objects of one run on one rank; build.py makes them."""

    config: RunConfig
    run_dir: str
    engine: Engine
    objective: Objective
    data: TrainingData
    total_steps: int
    state: RunState
    """Where the run starts, and the fingerprints that go into each checkpoint."""
    model_files: str
    """Folder with config.json and tokenizer files, copied into each checkpoint."""
    encoder_shape: EncoderShape
    matmul_peak: float
    """FLOPs per second of this rank's device."""
    evaluate: Callable[[int], dict[str, float]]
    """Collective evaluation at a step; figures for the log, none where there is no test set."""
    guard: RunGuard
    """Lease, heartbeat and watchdog of this run."""
    planned_bytes: int = 0
    """Peak memory of this rank as counted beforehand; 0: not counted."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a rank wants to happen after a step; what one rank wants, all do."""

    requeue: bool = False
    """Save, and leave to be started again."""
    stop: bool = False
    """Save, and leave for good."""
    save: bool = False
    """Save and go on."""


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step over all ranks."""

    figures: dict[str, float]
    """Means over ranks and accumulated batches."""
    num_samples: int
    num_tokens: int
    padded_tokens: int
    """Tokens that padding to the longest text would have cost."""
    num_truncated: int
    wishes: Wishes
    """Of all ranks together."""
    nonfinite: str
    """Rank with the most figures that are not finite, and their names; empty when all are finite."""
    seconds_by_part: dict[str, list[float]]
    """For each of TIMED_PARTS, what every rank took."""


def train(run: Run, stop: StopSignal) -> int:
    """Train to the last step, or until asked to stop; returns the process' exit code.

    Raises:
        TrainingError: a loss or gradient was not finite and engine.on_nonfinite is "stop"; weights are those
            before that step.
    """
    settings, first_step = run.config.train, run.state.progress.step
    progress, is_stopped = run.state.progress, False
    saves, health = SaveClock(settings.save_every_minutes, first_step), StepHealth(run)
    clock = StepClock(run.matmul_peak)
    waiting = clock.waiting_for(run.data.batches(comm.rank(), comm.world_size(), first_step, run.total_steps))
    # files and bar belong to the main rank: elsewhere both do nothing
    metrics = MetricsWriter(run.run_dir, first_step, active=comm.is_main())
    bar = TrainingProgress(run.total_steps, first_step, settings.log_every_steps, active=comm.is_main())
    with metrics, bar:
        if _owes_evaluation(run, first_step):
            _evaluate(run, first_step, metrics, bar)
        run.guard.progress(first_step, run.total_steps)
        run.guard.at(first_step, "data")
        for batches in waiting:
            run.guard.at(progress.step, "forward")
            wishes = Wishes(requeue=stop.wants_requeue, stop=stop.wants_stop, save=saves.is_due())
            report = run_step(run, batches, progress, wishes, clock.last_wait_seconds)
            run.guard.at(progress.step, "update")
            update = run.engine.update(progress.step, drop=bool(report.nonfinite))
            health.check(report, update, progress.step)
            progress = _advance(run, progress, report)
            step = progress.step
            run.guard.at(step, "log")
            if step == first_step + MEMORY_STEPS:
                _report_memory(run)
            lengths = [length for batch in batches for length in batch.texts.lengths]
            clock.add(report.num_tokens, run.encoder_shape.training_flops(lengths))
            is_last = step == run.total_steps
            is_stopped = (report.wishes.requeue or report.wishes.stop) and not is_last
            bar.update(step, report.figures, report.num_tokens)
            run.guard.progress(step, run.total_steps)
            if _is_due(step, settings.log_every_steps, is_last):
                values = _log_values(run, report, update, clock)
                metrics.write(step, values)
                run.guard.progress(step, run.total_steps, values["speed/tokens_per_second"])
                for warning in run.objective.warnings(values, settings.dead_head_share):
                    logger.warning("step %d: %s", step, warning)
                for straggler in health.stragglers():
                    logger.warning("step %d: %s", step, straggler)
            # saved before it is evaluated: a crash in an evaluation must not cost the steps before it
            if _is_due(step, settings.save_every_steps, is_last or is_stopped or report.wishes.save):
                run.guard.at(step, "save")
                with bar.paused():
                    metrics.flush()
                    save(run, progress)
                saves.done(step)
            # whoever asks a run to stop does not wait for an evaluation
            if not is_stopped and _evaluates_at(run, step):
                _evaluate(run, step, metrics, bar)
            if is_stopped:
                break
            run.guard.at(step, "data")
    where = (progress.step, run.total_steps, saves.step)
    said = "already finished:" if first_step == run.total_steps else "stopped at"
    logger.info("%s step %d of %d; newest checkpoint: step %d", said, *where)
    if not is_stopped:
        return 0
    return EXIT_STOPPED if report.wishes.stop else EXIT_REQUEUE


class SaveClock:
    """When the last checkpoint was written, by this rank's clock; the ranks agree by `Wishes`."""

    def __init__(self, every_minutes: float | None, step: int):
        self.step = step
        """Of the newest checkpoint."""
        self._every_seconds = every_minutes and every_minutes * 60.0
        self._since = time.monotonic()

    def is_due(self) -> bool:
        """Whether the newest checkpoint is older than the recipe wants; the main rank's clock decides."""
        is_old = self._every_seconds is not None and time.monotonic() - self._since >= self._every_seconds
        return is_old and comm.is_main()

    def done(self, step: int) -> None:
        """A checkpoint of `step` was written."""
        self.step, self._since = step, time.monotonic()


class StepHealth:
    """Watches losses and skipped steps of a run."""

    def __init__(self, run: Run):
        self._run, self._spikes, self._skipped = run, SpikeAlarm(), 0
        self._times = StragglerWatch()

    def check(self, report: StepReport, update: UpdateResult, step: int) -> None:
        """Act on the step after `step` done ones.

        Raises:
            TrainingError: its loss or gradient was not finite and the policy is to stop, or too many steps in
                a row were skipped; names the checkpoints there are.
        """
        engine = self._run.config.engine
        self._times.add(report.seconds_by_part)
        steps = list_steps(self._run.run_dir) if update.skipped else []
        check_finite(engine.on_nonfinite, report, update, step, steps)
        self._skipped = self._skipped + 1 if update.skipped else 0
        if self._skipped > engine.max_skipped_steps:
            limit = f"engine.max_skipped_steps = {engine.max_skipped_steps}"
            rule = f"{self._skipped} steps in a row were not finite ({limit})"
            raise TrainingError(f"step {step + 1}", "skipped", rule, _way_back(steps))
        said = self._spikes.check(report.figures.get("loss/total", float("nan")))
        if said is not None and comm.is_main():
            logger.warning("step %d: %s; `megam3 inspect-batch` shows the rows of this step", step + 1, said)

    def stragglers(self) -> list[Straggler]:
        """Ranks that the others waited for lately; said by the main rank alone."""
        return self._times.read() if comm.is_main() else []


def _way_back(steps: Sequence[int]) -> str:
    remedy = "lower optim.lr, or look at the batch with `megam3 inspect-batch`"
    if not steps:
        return remedy
    listed = ", ".join(str(step) for step in steps[-5:])
    return f"{remedy}; if the losses were bad before, go back with train.resume_step (checkpoints: {listed})"


def _evaluates_at(run: Run, step: int) -> bool:
    every = run.config.train.evaluate_every_steps
    return every is not None and step > 0 and _is_due(step, every, step == run.total_steps)


def _owes_evaluation(run: Run, step: int) -> bool:
    """Whether a run that was killed in the evaluation after its save has to catch up on it."""
    names = os.listdir(folder) if os.path.isdir(folder := os.path.join(run.run_dir, "eval")) else []
    done = [name for name in names if name.startswith(f"step-{step:06d}-")]
    is_owed = _evaluates_at(run, step) and len(done) < len(run.config.evaluation.folders)
    return comm.any_rank(is_owed and comm.is_main())


def _evaluate(run: Run, step: int, metrics: MetricsWriter, bar: TrainingProgress) -> None:
    run.guard.at(step, "evaluate")
    with bar.paused():
        metrics.write(step, run.evaluate(step))


def run_step(
    run: Run, batches: Sequence[Batch], progress: Progress, wishes: Wishes, waited_seconds: float = 0.0
) -> StepReport:
    """Forward and backward passes of one optimizer step, for whose batches this rank `waited_seconds`; then
    one collective in which all ranks learn the figures and agree."""
    began = time.process_time()
    seed_step(run.config.train.seed, progress.step, comm.rank())
    figures: list[dict[str, torch.Tensor]] = []
    with run.engine.step_scope():
        for index, batch in enumerate(batches):
            with run.engine.accumulation(index, len(batches)):
                figures.append(run.objective.run(run.engine, batch.to(run.engine.device), progress))
    names = list(figures[0])
    means = torch.stack([torch.stack([f[name].double() for name in names]) for f in figures]).mean(0)
    counts = [
        sum(b.num_samples for b in batches),
        sum(b.texts.num_tokens for b in batches),
        sum(b.padded_tokens for b in batches),
        sum(b.num_truncated for b in batches),
        int(wishes.requeue),
        int(wishes.stop),
        int(wishes.save),
    ]
    means = means.cpu()  # waits for the device
    times = [waited_seconds, time.process_time() - began]
    row_F = torch.cat([means, torch.tensor([*counts, *times], dtype=torch.float64)])
    return join_ranks(names, comm.all_gather_rows(row_F))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step; distinct over steps and ranks, and independent of how the run got there."""
    seed_torch((seed * 1_000_003 + step) * 65_537 + rank)


def seed_torch(seed: int) -> None:
    """Seed torch with any integer from 0 on: itself where torch takes it (64 bits), its hash beyond."""
    torch.manual_seed(seed if seed < 1 << 64 else key_of(seed))


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint of `progress`; collective."""
    began = time.monotonic()
    folder = save_checkpoint(
        run.run_dir,
        replace(run.state, progress=progress),
        run.engine.save,
        run.model_files,
        Retention(
            keep=run.config.train.keep_checkpoints,
            every_steps=run.config.train.keep_every_steps,
            resumed_step=run.state.progress.step or None,
        ),
        fence=run.guard.fence,
    )
    logger.info("saved %s (%.1f s)", folder, time.monotonic() - began)


def _is_due(step: int, every_steps: int | None, is_last: bool) -> bool:
    return is_last or (every_steps is not None and step % every_steps == 0)


def join_ranks(names: list[str], rows_WF: torch.Tensor) -> StepReport:
    """The report of a step from every rank's row: its figures in the order of `names`, then the seven
    counts of `run_step`, then TIMED_PARTS."""
    widths = [len(names), rows_WF.shape[1] - len(names) - len(TIMED_PARTS), len(TIMED_PARTS)]
    figures_WF, counts_WC, seconds_WP = rows_WF.split(widths, dim=1)
    counts = counts_WC.sum(0).long().tolist()
    # scores are global, so one rank's bad vector spoils every rank's loss; its own figures are bad only where
    # it came from
    bad_WF = ~torch.isfinite(figures_WF)
    worst = int(bad_WF.sum(1).argmax())
    nonfinite = (
        f"rank {worst}: {', '.join(name for name, bad in zip(names, bad_WF[worst]) if bad)}"
        if bad_WF.any()
        else ""
    )
    means = dict(zip(names, figures_WF.mean(0).tolist(), strict=True))
    samples, tokens, padded, truncated, requeues, stops, saves = counts
    return StepReport(
        figures=means,
        num_samples=samples,
        num_tokens=tokens,
        padded_tokens=padded,
        num_truncated=truncated,
        wishes=Wishes(requeue=requeues > 0, stop=stops > 0, save=saves > 0),
        nonfinite=nonfinite,
        seconds_by_part=dict(zip(TIMED_PARTS, seconds_WP.T.tolist(), strict=True)),
    )


def check_finite(
    policy: str, report: StepReport, result: UpdateResult, step: int, checkpoints: Sequence[int] = ()
) -> None:
    """Act on a step that was not taken; `step` counts from 0, `checkpoints` are the steps one can go back to.

    Raises:
        TrainingError: engine.on_nonfinite is "stop"; names step, rank and figures.
    """
    if not result.skipped:
        return
    what = report.nonfinite or "gradient norm"
    if policy == "skip":
        if comm.is_main():
            logger.warning("step %d skipped: %s is not finite; weights unchanged", step + 1, what)
        return
    raise TrainingError(
        f"step {step + 1}, {what}",
        "not finite",
        "losses and gradients must be finite; the weights are those before this step",
        f"{_way_back(checkpoints)}; or set engine.on_nonfinite=skip",
    )


def _report_memory(run: Run) -> None:
    measured, what = (
        peak_memory_bytes(run.engine.device) / 2**30,
        "tensors" if run.engine.device.type == "cuda" else "the whole process",
    )
    planned = f"; planned {run.planned_bytes / 2**30:.2f} GiB" if run.planned_bytes else ""
    logger.info("peak memory after %d steps: %.2f GiB (%s)%s", MEMORY_STEPS, measured, what, planned)


def _advance(run: Run, progress: Progress, report: StepReport) -> Progress:
    step = progress.step + 1
    return Progress(
        step=step,
        epoch=run.data.epoch_of(step),
        samples=progress.samples + report.num_samples,
        tokens=progress.tokens + report.num_tokens,
    )


def _log_values(run: Run, report: StepReport, result: UpdateResult, clock: StepClock) -> dict[str, float]:
    speed = clock.read()
    return {
        **report.figures,
        "optim/grad_norm": result.grad_norm,
        "optim/lr": result.lr,
        "speed/tokens_per_second": speed.tokens_per_second,
        "speed/matmul_peak_share": speed.peak_share or 0.0,
        "speed/data_wait_share": speed.data_wait_share,
        "memory/peak_bytes": float(peak_memory_bytes(run.engine.device)),
        "data/samples": float(report.num_samples),
        "data/tokens": float(report.num_tokens),
        "data/truncated_texts": float(report.num_truncated),
        "data/padding_avoided_share": 1.0 - report.num_tokens / max(1, report.padded_tokens),
    }
