"""Preparing a store: cut inputs into units, tokenise the unfinished in parallel, finish complete datasets.

Killed at any moment and started again, it redoes only units without a summary file and ends with the same
bytes. Files, or lines of a JSONL file, that came to the data become further units: what was prepared stays.
With `shard=(i, n)` a process takes every n-th unit, so an array of jobs shares the work without talking;
whichever finds all units complete writes the manifest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megam3.config.schema import DataConfig, DatasetConfig
from megam3.data.encode import ShardJob, build_shard
from megam3.data.finish import duplicate_lines, finish_dataset, remove_abandoned
from megam3.data.inputs import appended, changes, prepared_part, recognise
from megam3.data.manifest import (
    InputFile,
    Manifest,
    ShardSummary,
    StoreSpec,
    TextRules,
)
from megam3.data.process import Worker
from megam3.data.shard import write_checked
from megam3.data.source import ForwardReader, find_files, split_file
from megam3.data.store import dataset_folder
from megam3.data.tokenizer import Tokenizer
from megam3.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

UNIT_BYTES = 64 << 20
"""Text per shard: 1.2 billion pairs are thousands of files, and a kill loses seconds."""
MAX_INDEXED_TOKENS = 65535
"""The index keeps lengths in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class PrepareProgress:
    """Where preparation stands; handed to the caller after every unit."""

    dataset: str
    units_done: int
    units_total: int
    records: int
    tokens: int
    rejected: int
    seconds: float
    """Since the first unit was begun."""

    @property
    def records_per_second(self) -> float:
        """Of this process and its workers."""
        return self.records / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        """At the pace so far."""
        return self.seconds / self.units_done * (self.units_total - self.units_done)


@dataclass(frozen=True, kw_only=True)
class BegunDataset:
    """A dataset whose spec is on disk."""

    name: str
    folder: Path
    spec: StoreSpec
    max_rejected: int
    """Bad records that a unit may skip."""

    def summary(self, number: int) -> ShardSummary | None:
        """Of unit `number`, once that is complete."""
        return ShardSummary.read(self.folder / "shards" / f"{number:05d}.json")

    def summaries(self) -> list[ShardSummary] | None:
        """Of all units; None while some are incomplete."""
        found = [summary for number in range(len(self.spec.units)) if (summary := self.summary(number))]
        return found if len(found) == len(self.spec.units) else None

    def finished(self) -> Manifest | None:
        """The manifest, if it counts every unit: before data was appended, it counted fewer."""
        manifest = Manifest.read(self.folder / "manifest.json")
        return manifest if manifest is not None and len(manifest.shards) == len(self.spec.units) else None

    def digest_of(self, number: int) -> str | None:
        """Digest of what unit `number` was prepared from; None while it is not."""
        summary = self.summary(number)
        return None if summary is None else summary.input_digest

    def unfinished(self, shard: tuple[int, int]) -> list[int]:
        """Incomplete units among i, i + n, i + 2n, …"""
        if self.finished() is not None:
            return []
        mine = range(shard[0], len(self.spec.units), shard[1])
        return [number for number in mine if not (self.folder / "shards" / f"{number:05d}.json").is_file()]

    def job(self, number: int, drop: Sequence[int] = ()) -> ShardJob:
        """Unit `number`, without the lines in `drop`."""
        return ShardJob(
            unit=self.spec.units[number],
            rules=self.spec.rules(),
            folder=self.folder / "shards",
            name=f"{number:05d}",
            max_rejected=self.max_rejected,
            drop=frozenset(drop),
        )


def prepare_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    store_dir: str | Path,
    num_processes: int = 0,
    shard: tuple[int, int] = (0, 1),
    on_progress: Callable[[PrepareProgress], None] = lambda progress: None,
    unit_bytes: int = UNIT_BYTES,
) -> list[Manifest]:
    """Make the store of `config.train`, or complete it; a complete one is left alone.

    Args:
        num_processes: background processes; 0 works in this one.
        shard: (i, n): prepare only units i, i + n, i + 2n, …
        on_progress: called after every unit.
        unit_bytes: text per shard; a store keeps the value it was begun with.

    Returns:
        Manifests of the datasets that are complete now, in the recipe's order.

    Raises:
        DataError: bad input (records beyond the limit included), a store made from other settings, or a full
        disk.
    """
    for field in ("passage_max_tokens", "query_max_tokens"):
        if getattr(config, field) > MAX_INDEXED_TOKENS:
            rule = f"must be at most {MAX_INDEXED_TOKENS}"
            raise ConfigError(f"data.{field}", getattr(config, field), rule, "lower it")
    begun = [_begin(config, dataset, tokenizer, store_dir, unit_bytes) for dataset in config.train]
    jobs = [(dataset.name, dataset.job(n)) for dataset in begun for n in dataset.unfinished(shard)]
    try:
        _run_jobs(config, jobs, tokenizer, num_processes, on_progress)
    except BaseException:
        # one unit's error ends workers that are in the middle of another
        for dataset in begun:
            remove_abandoned(dataset.folder)
        raise
    finished = [_finish(config, dataset, tokenizer) for dataset in begun]
    return [manifest for manifest in finished if manifest is not None]


def _begin(
    config: DataConfig, dataset: DatasetConfig, tokenizer: Tokenizer, store_dir: str | Path, unit_bytes: int
) -> BegunDataset:
    """Write what the shards are made from; when it was begun before, it must match the recipe.

    Raises:
        DataError: it does not, or the folder cannot be made.
    """
    folder = dataset_folder(store_dir, dataset.name)
    wanted = _wanted_spec(config, dataset, tokenizer, store_dir, unit_bytes)
    found = StoreSpec.read(folder / "spec.json")
    begun = BegunDataset(
        name=dataset.name,
        folder=folder,
        spec=found or _with_units(wanted),
        max_rejected=config.max_bad_records if config.on_bad_record == "skip" else 0,
    )
    if found is None:
        _make_folder(folder / "shards")
        write_checked(folder / "spec.json", [begun.spec.to_json()])
        return begun
    begun = replace(begun, spec=recognise(found, wanted.inputs, begun.digest_of))
    grown = _grown_spec(begun, wanted)
    if begun.spec != found:
        _note_present_inputs(begun)
    return begun if grown == begun.spec else _grow(begun, grown)


def _wanted_spec(
    config: DataConfig, dataset: DatasetConfig, tokenizer: Tokenizer, store_dir: str | Path, unit_bytes: int
) -> StoreSpec:
    """What the recipe makes of the inputs that are there, without the units they would be cut into."""
    rules = TextRules(
        language=dataset.language,
        query_instruction=dataset.query_instruction,
        passage_instruction=dataset.passage_instruction,
        query_max_tokens=config.query_max_tokens,
        passage_max_tokens=config.passage_max_tokens,
    )
    files = find_files(dataset.paths, f"data.train[{dataset.name}].paths", outside=Path(store_dir))
    inputs = {path: InputFile((status := os.stat(path)).st_size, status.st_mtime_ns) for path in files}
    return StoreSpec(
        tokenizer=tokenizer.fingerprint, inputs=inputs, unit_bytes=unit_bytes, units=[], **rules.model_dump()
    )


def _with_units(wanted: StoreSpec) -> StoreSpec:
    """Cut as a store that is begun now."""
    units = [unit for path in wanted.inputs for unit in split_file(path, wanted.unit_bytes)]
    return wanted.model_copy(update={"units": units})


def _grown_spec(begun: BegunDataset, wanted: StoreSpec) -> StoreSpec:
    """The store's spec, with further units for data that came since it was begun.

    Raises:
        DataError: the recipe wants something else than what is prepared.
    """
    grown = appended(begun.spec, wanted.inputs, begun.digest_of)
    if changes(grown, wanted):
        prepared = prepared_part(begun.spec, begun.digest_of)
        # while nothing is prepared, nothing can contradict the recipe
        can_grow = bool(prepared.units)
        grown = appended(prepared, wanted.inputs, begun.digest_of) if can_grow else _with_units(wanted)
    if changes(grown, wanted):
        remedy = (
            "go back to what it was prepared from, choose another data.store_dir, or prepare anew:"
            f" rm -r {shlex.quote(str(begun.folder))} && megam3 prepare RECIPE"
        )
        rule = f"does not match the recipe ({begun.folder})"
        raise DataError(
            f"store of dataset {begun.name}", "; ".join(changes(begun.spec, wanted)), rule, remedy
        )
    return grown


def _grow(begun: BegunDataset, grown: StoreSpec) -> BegunDataset:
    # the manifest stays until the new units are prepared too: whoever reads the store finds it whole
    write_checked(begun.folder / "spec.json", [grown.to_json()])
    logger.info(
        "store of dataset %s: its data has grown; %d units are prepared, the others of %d are now",
        begun.name,
        sum(begun.digest_of(number) is not None for number in range(len(grown.units))),
        len(grown.units),
    )
    return replace(begun, spec=grown)


def _note_present_inputs(begun: BegunDataset) -> None:
    """Write down where the inputs are now, so that the next start does not read them again to know them."""
    manifest = Manifest.read(begun.folder / "manifest.json")
    try:
        if manifest is not None:
            manifest.with_spec(begun.spec).write(begun.folder)
        write_checked(begun.folder / "spec.json", [begun.spec.to_json()])
    except DataError as error:
        # a store of somebody else's that may only be read serves as well
        logger.warning(
            "store of dataset %s: its inputs have moved, which cannot be noted: %s", begun.name, error
        )
    else:
        logger.info("store of dataset %s: same contents, other paths or dates of its inputs", begun.name)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be made ({error})"
        raise DataError(
            "data.store_dir", str(folder), rule, "choose a folder that can be written to"
        ) from error


def make_handler(tokenizer: str) -> Callable[[ShardJob], ShardSummary]:
    """Handler that prepares the unit of a job (worker side); `tokenizer` is its JSON."""
    opened, reader = Tokenizer.from_json(tokenizer), ForwardReader()
    return lambda job: build_shard(job, opened, reader)


def _run_jobs(
    config: DataConfig,
    jobs: Sequence[tuple[str, ShardJob]],
    tokenizer: Tokenizer,
    num_processes: int,
    on_progress: Callable[[PrepareProgress], None],
) -> None:
    """Prepare units, each given with the name of its dataset."""
    records = tokens = rejected = 0
    started = time.monotonic()
    with contextlib.closing(_summaries([job for _, job in jobs], tokenizer, num_processes)) as summaries:
        for done, ((dataset, _), summary) in enumerate(zip(jobs, summaries), start=1):
            records += summary.rows
            tokens += summary.tokens
            rejected += summary.rejected
            on_progress(
                PrepareProgress(
                    dataset=dataset,
                    units_done=done,
                    units_total=len(jobs),
                    records=records,
                    tokens=tokens,
                    rejected=rejected,
                    seconds=time.monotonic() - started,
                )
            )
            _check_rejected(config, rejected)


def _summaries(
    jobs: Sequence[ShardJob], tokenizer: Tokenizer, num_processes: int
) -> Generator[ShardSummary, None, None]:
    """Do the jobs, in order; no process is started for a single one."""
    if num_processes == 0 or len(jobs) < 2:
        with contextlib.closing(ForwardReader()) as reader:
            yield from (build_shard(job, tokenizer, reader) for job in jobs)
        return
    workers = [Worker(make_handler, tokenizer.to_json()) for _ in range(min(num_processes, len(jobs)))]
    # two jobs per worker: the next unit is there when one ends, and none waits long behind a slow one
    ahead = 2 * len(workers)
    try:
        for number in range(len(jobs) + ahead):
            worker = workers[number % len(workers)]
            if number >= ahead:
                yield worker.receive()
            if number < len(jobs):
                worker.send(jobs[number])
    finally:
        for worker in workers:
            worker.close()


def _check_rejected(config: DataConfig, rejected: int) -> None:
    if rejected > config.max_bad_records:
        rule = f"is more than data.max_bad_records = {config.max_bad_records}"
        remedy = "see the *.rejects.jsonl files beside the shards; correct the data or raise the limit"
        raise DataError("rejected records", rejected, rule, remedy)


def _finish(config: DataConfig, begun: BegunDataset, tokenizer: Tokenizer) -> Manifest | None:
    """Finish a dataset if all its units are complete; None if other tasks of an array still work on some."""
    manifest = begun.finished()
    summaries = begun.summaries() if manifest is None else None
    if summaries is None:
        return manifest
    # shards that hold repeated ids are written again without them (with `stop`, the first one is an error
    # instead)
    duplicates = duplicate_lines(begun.folder, summaries)
    with contextlib.closing(ForwardReader()) as reader:
        for number, lines in duplicates.items():
            summaries[number] = build_shard(begun.job(number, lines), tokenizer, reader)
    _check_rejected(config, sum(summary.rejected for summary in summaries))
    return finish_dataset(begun.folder, begun.name, begun.spec, summaries)
