"""The one entry of training: a recipe's data section, a tokenizer and a store in, batches out.

    data = open_training_data(config.data, tokenizer, store_dir, seed)
    for batches in data.batches(rank, world_size, start_step, stop_step):
        …                                       # the accumulation_steps batches of one optimizer step

The position in the data is three integers (seed, epoch, step) and the fingerprint; nothing else is ever
saved.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from megam3.batch import Batch
from megam3.config.schema import DataConfig
from megam3.data.assemble import Assembler, TextFrame
from megam3.data.loader import Loader
from megam3.data.manifest import Manifest
from megam3.data.plan import Plan, build_plan
from megam3.data.prepare import PrepareProgress, prepare_data
from megam3.data.skips import Ranges, ServedBatches
from megam3.data.store import StoredDataset, dataset_folder, verify_files
from megam3.data.tokenizer import Tokenizer
from megam3.data.worker import WorkerSetup, changed_parts, describe, fingerprint_of, make_handler, open_all
from megam3.dist import comm
from megam3.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
"""The longest that ranks wait in one collective call while the main rank prepares the store."""


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Opened data and its plan."""

    config: DataConfig
    store_dir: str
    datasets: tuple[StoredDataset, ...]
    plan: Plan
    frame: TextFrame
    tokenizer: str
    """The tokenizer's fingerprint."""

    @cached_property
    def fingerprint(self) -> str:
        """`tokenizer:… data:… plan:…`: equal fingerprints serve equal batches on any number of ranks."""
        return fingerprint_of(self.tokenizer, self.datasets, self.plan)

    @property
    def num_batches_per_epoch(self) -> int:
        """Batches of one pass over the data."""
        return self.plan.num_batches

    @property
    def num_steps_per_epoch(self) -> int:
        """Optimizer steps of one pass; with accumulation a step may reach over the epoch's edge."""
        return self.num_steps(1.0)

    def num_steps(self, epochs: float) -> int:
        """Optimizer steps of `epochs` passes, rounded up."""
        return max(1, math.ceil(epochs * self.num_batches_per_epoch / self.config.batch.accumulation_steps))

    def epoch_of(self, step: int) -> int:
        """Epoch in which optimizer step `step` begins, from 0."""
        return step * self.config.batch.accumulation_steps // self.num_batches_per_epoch

    def state(self, step: int) -> dict:
        """What a checkpoint keeps of the data's position before `step`."""
        return {
            "seed": self.plan.seed,
            "epoch": self.epoch_of(step),
            "step": step,
            "fingerprint": self.fingerprint,
        }

    def check_fingerprint(self, saved: str) -> None:
        """Refuse to continue a run on other data.

        Raises:
            DataError: naming what changed: tokenizer, data, or plan (seed, batch sizes, buckets, weights,
            draws).
        """
        changed = changed_parts(saved, self.fingerprint)
        if changed:
            meaning = {
                "plan": "plan (seed, batch size, buckets, weights or draws)",
                "data": "data (contents of the store)",
            }
            what = " and ".join(meaning.get(name, name) for name in changed)
            remedy = (
                "restore it, start a new run, or continue all the same with train.resume_with_other_data=true"
            )
            raise DataError(
                "data fingerprint", self.fingerprint, f"is not the run's: the {what} changed", remedy
            )

    def batches(
        self,
        rank: int,
        world_size: int,
        start_step: int,
        stop_step: int,
        skipped: Ranges = (),
        *,
        pin: bool = False,
    ) -> Iterator[list[Batch]]:
        """This rank's batches of steps start_step … stop_step-1, each a list of `accumulation_steps`; places
        of the plan in `skipped` are left out. `pin`: in page-locked memory, for copies to a GPU.

        Raises:
            ConfigError: more ranks than queries in the smallest batch.
            UserError, WorkerError: from a background worker.
        """
        self.check_world_size(world_size)
        size = self.config.batch.accumulation_steps
        numbers = ServedBatches(start_step, stop_step, size, skipped)
        setup = WorkerSetup(
            config=self.config,
            store_dir=self.store_dir,
            seed=self.plan.seed,
            frame=self.frame,
            tokenizer=self.tokenizer,
            fingerprint=self.fingerprint,
            rank=rank,
            world_size=world_size,
        )
        num_workers, prefetch = self.config.num_workers, self.config.prefetch_batches
        loader = Loader(make_handler, setup, numbers, num_workers, prefetch, pin=pin)
        with closing(loader):
            held: list[Batch] = []
            for batch in loader:
                held.append(batch)
                if len(held) == size:
                    yield held
                    held = []

    def check_world_size(self, world_size: int) -> None:
        """Raises ConfigError when a batch of the plan has fewer queries than there are ranks."""
        smallest = self.plan.smallest_batch
        if smallest < world_size:
            rule = f"the plan's smallest batch has {smallest} queries, fewer than the {world_size} ranks"
            raise ConfigError(
                "data.batch", smallest, rule, "use fewer ranks, or batches of at least two queries per rank"
            )

    def assembler(self) -> Assembler:
        """Builds any batch of any rank in this process (inspection, tests, `num_workers: 0`)."""
        return Assembler(self.config, self.plan, self.datasets, self.frame)


def open_training_data(
    config: DataConfig, tokenizer: Tokenizer, store_dir: str | Path, seed: int, *, verify: bool = True
) -> TrainingData:
    """Open the store of a recipe, prepare first what is not in it yet, check it, and lay out its batches.

    `verify=False`: another rank prepared it and compared the checksums on this machine a moment ago. Then the
    inputs are not looked at: where a moved one cannot be noted, every rank would read all of it again.

    Preparing uses every core this process may use. Several ranks: let one open, wait for it, then open on the
    others.

    Raises:
        DataError: bad input, a store made from something else (named), or a damaged one.
        ConfigError: batch sizes or buckets that do not fit the data.
    """
    if verify:
        num_processes = len(os.sched_getaffinity(0))
        prepare_data(config, tokenizer, store_dir, num_processes, on_progress=_log_progress)
    if verify and config.verify_store:
        _verify_store(config, store_dir)
    opened = open_all(config, store_dir)
    framed = len(tokenizer.prefix) + len(tokenizer.suffix)
    instructions, _ = tokenizer.encode([dataset.passage_instruction for dataset in config.train], 65535)
    frame = TextFrame(
        prefix=tokenizer.prefix,
        suffix=tokenizer.suffix,
        instruction_tokens=tuple(max(0, len(ids) - framed) for ids in instructions),
        special_ids=tokenizer.weightless_ids,
    )
    plan = build_plan(config, describe(config, opened), seed)
    return TrainingData(
        config=config,
        store_dir=str(store_dir),
        datasets=opened,
        plan=plan,
        frame=frame,
        tokenizer=tokenizer.fingerprint,
    )


def open_on_every_rank(
    config: DataConfig, tokenizer: Tokenizer, store_dir: str | Path, seed: int
) -> TrainingData:
    """Tokenise what the store lacks on the main rank, then open it everywhere; collective.

    Raises:
        DataError: of the preparation on the main rank, of opening on any; ranks that waited say that another
            one failed.
    """
    hosts = comm.gather_objects_json(socket.gethostname())
    is_first_on_host = hosts.index(socket.gethostname()) == comm.rank()

    def opens(verify: bool) -> TrainingData:
        return open_training_data(config, tokenizer, store_dir, seed, verify=verify)

    data = _while_others_wait(lambda: opens(True), comm.is_main(), store_dir)
    # every node reads the files through its own memory and its own path to them
    is_next = is_first_on_host and not comm.is_main()
    checked = _while_others_wait(lambda: opens(True), is_next, store_dir)
    return data or checked or opens(False)


def _while_others_wait(
    work: Callable[[], TrainingData], is_mine: bool, store_dir: str | Path
) -> TrainingData | None:
    """Do `work` on the ranks whose it is; collective. None on the others.

    In a thread, so that these ranks answer the others meanwhile: preparing and reading a large store takes
    longer than a collective call may wait.
    """
    with ThreadPoolExecutor(1) as background:
        task = background.submit(work) if is_mine else None
        while comm.any_rank(task is not None and not task.done()):
            if task is not None:
                wait([task], timeout=HEARTBEAT_SECONDS)
        has_failed = comm.any_rank(task is not None and task.exception() is not None)
        if task is not None:
            return task.result()
    if has_failed:
        rule = "a rank that opens it for the others could not"
        raise DataError("data.store_dir", str(store_dir), rule, "see its message")
    return None


def _verify_store(config: DataConfig, store_dir: str | Path) -> None:
    """Compare the checksums of all files of a recipe's datasets, and say what that cost.

    Raises:
        DataError: names the damaged file and the remedy.
    """
    began, num_bytes = time.monotonic(), 0
    for dataset in config.train:
        folder = dataset_folder(store_dir, dataset.name)
        manifest = Manifest.read(folder / "manifest.json")
        if manifest is not None:
            num_bytes += verify_files(folder, manifest, min(8, len(os.sched_getaffinity(0))))
    seconds = time.monotonic() - began
    logger.info("store: checksums of %.1f MiB agree (%.1f s)", num_bytes / 2**20, seconds)


def _log_progress(progress: PrepareProgress) -> None:
    logger.info(
        "preparing %s: unit %d of %d, %d records",
        progress.dataset,
        progress.units_done,
        progress.units_total,
        progress.records,
    )
