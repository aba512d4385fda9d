"""One optimizer step over all ranks: the passes of this rank, then one collective call in which all learn the
figures and agree on what comes next.

Everything random in a step is a function of (seed, step, rank), so a resumed run draws what the uninterrupted
one would have drawn.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megam3.batch import Batch, Progress
from megam3.checkpoint import RunState
from megam3.config.schema import RunConfig
from megam3.data.dataset import TrainingData
from megam3.data.permute import key_of
from megam3.dist import comm
from megam3.encoders import EncoderShape
from megam3.engine.deepspeed import Engine
from megam3.objectives.base import Objective
from megam3.obs.guard import RunGuard
from megam3.planning.memory_report import RunPlan

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
    memory_plan: RunPlan | None = None
    """Memory of this rank as counted beforehand; None: an encoder that is not counted."""
    bytes_before_model: int = 0
    """What the process held before its model (`forget_peak_memory`)."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What a rank wants to happen after a step; what one rank wants, all do."""

    requeue: bool = False
    """Save, and leave to be started again."""
    stop: bool = False
    """Save, and leave for good."""
    save: bool = False
    """Save and go on."""
    writing: bool = False
    """A file of the checkpoint in flight is not on the disk yet: it waits for its name."""

    @property
    def leave(self) -> bool:
        """Whether the run ends after this step, for good or for a while."""
        return self.requeue or self.stop


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


def run_step(
    run: Run, batches: Sequence[Batch], progress: Progress, wishes: Wishes, waited_seconds: float = 0.0
) -> StepReport:
    """Forward and backward passes of one optimizer step, for whose batches this rank `waited_seconds`; then
    one collective in which all ranks learn the figures and agree."""
    began = time.process_time()
    seed_step(run.config.train.seed, progress.step, comm.rank())
    figures: list[dict[str, torch.Tensor]] = []
    with run.engine.step_scope():
        on_device = [batch.to(run.engine.device) for batch in batches]
        for index, prepared in enumerate(run.objective.prepare(on_device, progress)):
            with run.engine.accumulation(index, len(batches)):
                figures.append(run.objective.run(run.engine, prepared, progress))
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
        int(wishes.writing),
    ]
    times = [waited_seconds, time.process_time() - began]
    others = torch.tensor([*counts, *times], dtype=torch.float64)
    # the figures stay where they are until all ranks have them: one copy to the host, the step's one wait
    rows_WF = comm.all_gather_rows(torch.cat([means, comm.copy_pinned(others, means.device)]))
    return join_ranks(names, rows_WF.cpu())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed dropout for one step; distinct over steps and ranks, and independent of how the run got there."""
    seed_torch((seed * 1_000_003 + step) * 65_537 + rank)


def seed_torch(seed: int) -> None:
    """Seed torch with any integer from 0 on: itself where torch takes it (64 bits), its hash beyond."""
    torch.manual_seed(seed if seed < 1 << 64 else key_of(seed))


def join_ranks(names: list[str], rows_WF: torch.Tensor) -> StepReport:
    """The report of a step from every rank's row: its figures in the order of `names`, then the eight
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
    samples, tokens, padded, truncated, requeues, stops, saves, writing = counts
    return StepReport(
        figures=means,
        num_samples=samples,
        num_tokens=tokens,
        padded_tokens=padded,
        num_truncated=truncated,
        wishes=Wishes(requeue=requeues > 0, stop=stops > 0, save=saves > 0, writing=writing > 0),
        nonfinite=nonfinite,
        seconds_by_part=dict(zip(TIMED_PARTS, seconds_WP.T.tolist(), strict=True)),
    )
