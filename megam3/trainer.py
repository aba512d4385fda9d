"""The training loop. It knows no stage: objectives compute, the engine steps, this file counts, logs,
evaluates, saves and stops.

Everything random in a step is a function of (seed, step, rank), so a resumed run draws what the uninterrupted
one would have drawn.
"""

import logging
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import FrameType

import torch

from megam3.batch import Progress
from megam3.checkpoint import RunState, save_checkpoint
from megam3.config.schema import RunConfig
from megam3.data.dataset import TrainingData
from megam3.data.loader import Batch
from megam3.dist import comm
from megam3.encoders import EncoderShape
from megam3.engine.deepspeed import Engine, UpdateResult
from megam3.errors import TrainingError
from megam3.objectives.base import Objective
from megam3.obs.clock import StepClock, peak_memory_bytes
from megam3.obs.metrics import MetricsWriter
from megam3.obs.progress import TrainingProgress

logger = logging.getLogger(__name__)

MEMORY_STEPS = 3
"""Steps after which the memory a run holds has been seen: AdamW's moments come in the first, the allocator
settles in the next."""

EXIT_REQUEUE = 85
"""Exit code of a run that saved itself on SIGTERM or SIGUSR1 and wants to be started again; slurm/train.sh
turns it into a requeue."""


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
    planned_bytes: int = 0
    """Peak memory of this rank as counted beforehand; 0: not counted."""


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
    stop_requested: bool
    nonfinite: str
    """Rank with the most figures that are not finite, and their names; empty when all are finite."""


def train(run: Run, stop: "StopSignal") -> int:
    """Train to the last step, or until asked to stop; returns the process' exit code.

    Raises:
        TrainingError: a loss or gradient was not finite and engine.on_nonfinite is "stop"; weights are those
            before that step.
    """
    settings, first_step = run.config.train, run.state.progress.step
    progress, saved_step, is_stopped = run.state.progress, first_step, False
    clock = StepClock(run.matmul_peak)
    waiting = clock.waiting_for(run.data.batches(comm.rank(), comm.world_size(), first_step, run.total_steps))
    # files and bar belong to the main rank: elsewhere both do nothing
    metrics = MetricsWriter(run.run_dir, first_step, active=comm.is_main())
    bar = TrainingProgress(run.total_steps, first_step, settings.log_every_steps, active=comm.is_main())
    with metrics, bar:
        for batches in waiting:
            report = run_step(run, batches, progress, stop.requested)
            update = run.engine.update(progress.step, drop=bool(report.nonfinite))
            check_finite(run.config.engine.on_nonfinite, report, update, progress.step)
            progress = _advance(run, progress, report)
            step = progress.step
            if step == first_step + MEMORY_STEPS:
                _report_memory(run)
            lengths = [length for batch in batches for length in batch.texts.lengths]
            clock.add(report.num_tokens, run.encoder_shape.training_flops(lengths))
            is_last = step == run.total_steps
            is_stopped = report.stop_requested and not is_last
            bar.update(step, report.figures, report.num_tokens)
            if _is_due(step, settings.log_every_steps, is_last):
                values = _log_values(run, report, update, clock)
                metrics.write(step, values)
                for warning in run.objective.warnings(values, settings.dead_head_share):
                    logger.warning("step %d: %s", step, warning)
            # whoever asks a run to stop does not wait for an evaluation
            if not is_stopped and settings.evaluate_every_steps:
                if _is_due(step, settings.evaluate_every_steps, is_last):
                    with bar.paused():
                        metrics.write(step, run.evaluate(step))
            if _is_due(step, settings.save_every_steps, is_last or is_stopped):
                with bar.paused():
                    metrics.flush()
                    save(run, progress)
                saved_step = step
            if is_stopped:
                break
    where = (progress.step, run.total_steps, saved_step)
    logger.info("stopped at step %d of %d; newest checkpoint: step %d", *where)
    return EXIT_REQUEUE if is_stopped else 0


def run_step(run: Run, batches: Sequence[Batch], progress: Progress, stop_requested: bool) -> StepReport:
    """Forward and backward passes of one optimizer step, then one collective in which all ranks learn the
    figures and agree."""
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
        int(stop_requested),
    ]
    row_F = torch.cat([means.cpu(), torch.tensor(counts, dtype=torch.float64)])
    return join_ranks(names, comm.gather_rows(row_F))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step; distinct over steps and ranks, and independent of how the run got there."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)


def save(run: Run, progress: Progress) -> None:
    """Write a checkpoint of `progress`; collective."""
    folder = save_checkpoint(
        run.run_dir,
        replace(run.state, progress=progress),
        run.engine.save,
        run.model_files,
        run.config.train.keep_checkpoints,
    )
    logger.info("saved %s", folder)


def _is_due(step: int, every_steps: int | None, is_last: bool) -> bool:
    return is_last or (every_steps is not None and step % every_steps == 0)


def join_ranks(names: list[str], rows_WF: torch.Tensor) -> StepReport:
    """The report of a step from every rank's row: its figures in the order of `names`, then the five counts
    of `run_step`."""
    figures_WF, counts = rows_WF[:, : len(names)], rows_WF[:, len(names) :].sum(0).long().tolist()
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
    samples, tokens, padded, truncated, stops = counts
    return StepReport(
        figures=means,
        num_samples=samples,
        num_tokens=tokens,
        padded_tokens=padded,
        num_truncated=truncated,
        stop_requested=stops > 0,
        nonfinite=nonfinite,
    )


def check_finite(policy: str, report: StepReport, result: UpdateResult, step: int) -> None:
    """Act on a step that was not taken; `step` counts from 0.

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
        "lower optim.lr, look at the batch with tools/inspect_batch.py, or set engine.on_nonfinite=skip",
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


class StopSignal:
    """Remembers SIGTERM and SIGUSR1; the loop reads it at each step and ends after that step. The old
    handlers come back on exit.

    Entered before anything is built, so that a signal during a long start is not lost and does not kill.
    """

    def __init__(self) -> None:
        self.requested = False
        """A signal came."""
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
