"""Preparing a store: cut the inputs into units, tokenise the unfinished ones in parallel, finish the datasets that have all of theirs.

Killed at any moment and started again, it redoes only units without a summary file and ends with the same bytes. With `shard=(i, n)` a
process takes every n-th unit, so an array of jobs shares the work without talking; whichever finds all units complete writes the manifest.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from megam3.config.schema import DataConfig, DatasetConfig
from megam3.data.manifest import duplicate_lines, finish_dataset
from megam3.data.process import Worker, run_worker
from megam3.data.shard import TextRules, build_shard, input_digest, write_checked
from megam3.data.source import Unit, find_files, split_file
from megam3.data.store import FORMAT, dataset_folder, read_json
from megam3.data.tokenizer import Tokenizer
from megam3.errors import ConfigError, DataError

UNIT_BYTES = 64 << 20
"""Text per shard: large enough that 1.2 billion pairs are thousands of files, small enough that a killed run loses seconds."""


@dataclass(frozen=True)
class Progress:
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


@dataclass(frozen=True)
class Job:
    """One unit to prepare."""

    dataset: str
    number: int
    unit: Unit
    drop: tuple[int, ...] = ()


def prepare_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    store_dir: str | Path,
    num_processes: int = 0,
    shard: tuple[int, int] = (0, 1),
    on_progress: Callable[[Progress], None] = lambda progress: None,
    unit_bytes: int = UNIT_BYTES,
) -> list[dict]:
    """Make the store of `config.train`, or complete it; a complete one is left alone.

    Args:
        num_processes: background processes; 0 works in this one.
        shard: (i, n): prepare only units i, i + n, i + 2n, …
        on_progress: called after every unit.
        unit_bytes: text per shard; a store keeps the value it was begun with.

    Returns:
        Manifests of the datasets that are complete now, in the recipe's order.

    Raises:
        DataError: bad input (records beyond the limit included), a store made from other settings, or a full disk.
    """
    if config.passage_max_tokens > 65535 or config.query_max_tokens > 65535:
        raise ConfigError(
            "data.passage_max_tokens", config.passage_max_tokens, "must be at most 65535", "lower it"
        )
    specs = {
        dataset.name: _spec(config, dataset, tokenizer, store_dir, unit_bytes) for dataset in config.train
    }
    jobs = [job for name, spec in specs.items() for job in _unfinished(store_dir, name, spec, shard)]
    _run_jobs(config, specs, jobs, tokenizer, store_dir, num_processes, on_progress)
    return [
        manifest
        for name, spec in specs.items()
        if (manifest := _finish(config, name, spec, tokenizer, store_dir)) is not None
    ]


def _settings(config: DataConfig, dataset: DatasetConfig, tokenizer: Tokenizer) -> dict:
    rules = TextRules(
        dataset.language,
        dataset.query_instruction,
        dataset.passage_instruction,
        config.query_max_tokens,
        config.passage_max_tokens,
    )
    return {"format": FORMAT, "tokenizer": tokenizer.fingerprint, **asdict(rules)}


def _inputs(dataset: DatasetConfig, store_dir: str | Path) -> dict[str, list[int]]:
    files = find_files(dataset.paths, f"data.train[{dataset.name}].paths", outside=Path(store_dir))
    return {path: [(status := os.stat(path)).st_size, status.st_mtime_ns] for path in files}


def _changes(old: dict, new: dict, content_changed: Callable[[str], bool]) -> list[str]:
    changes = [
        f"{key} was {old[key]!r}, is {new[key]!r}"
        for key in new
        if key not in ("inputs", "units") and old.get(key) != new[key]
    ]
    before, after = old["inputs"], new["inputs"]
    changes += [f"{path} was not there" for path in after if path not in before]
    changes += [f"{path} is gone" for path in before if path not in after]
    for path in (path for path in after if path in before and before[path] != after[path]):
        if before[path][0] != after[path][0]:
            changes.append(f"{path} had {before[path][0]} bytes, has {after[path][0]}")
        elif content_changed(path):  # a new date alone is a copy or a touch, not a change
            changes.append(f"{path} has other contents")
    return changes


def _changed(name: str, changes: list[str]) -> DataError:
    remedy = "go back to what it was prepared from, or prepare into another data.store_dir (or delete this dataset's folder)"
    return DataError(f"store of dataset {name}", "; ".join(changes), "does not match the recipe", remedy)


def _spec(
    config: DataConfig, dataset: DatasetConfig, tokenizer: Tokenizer, store_dir: str | Path, unit_bytes: int
) -> dict:
    """What this dataset's shards are made from: read from disk when it was begun before, and then it must match."""
    folder = dataset_folder(store_dir, dataset.name)
    settings = _settings(config, dataset, tokenizer) | {"inputs": _inputs(dataset, store_dir)}
    found = read_json(folder / "spec.json")
    if found is not None:
        changes = _changes(found, settings, lambda path: _redigest(folder, found, path))
        if changes:
            raise _changed(dataset.name, changes)
        return found
    units = [unit for path in settings["inputs"] for unit in split_file(path, unit_bytes)]
    spec = settings | {
        "unit_bytes": unit_bytes,
        "units": [[u.path, u.format, u.start, u.stop] for u in units],
    }
    _make_folder(folder / "shards")
    write_checked(folder / "spec.json", [json.dumps(spec, sort_keys=True).encode()])
    return spec


def _redigest(folder: Path, spec: dict, path: str) -> bool:
    for number, unit in enumerate(spec["units"]):
        summary = read_json(_summary_path(folder, number)) if unit[0] == path else None
        if summary is not None and input_digest(Unit(*unit)) != summary["input_digest"]:
            return True
    return False


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            "data.store_dir",
            str(folder),
            f"cannot be made ({error})",
            "choose a folder that can be written to",
        ) from error


def _summary_path(folder: Path, number: int) -> Path:
    return folder / "shards" / f"{number:05d}.json"


def _unfinished(store_dir: str | Path, name: str, spec: dict, shard: tuple[int, int]) -> list[Job]:
    folder = dataset_folder(store_dir, name)
    if (folder / "manifest.json").is_file():
        return []
    mine = range(shard[0], len(spec["units"]), shard[1])
    return [
        Job(name, number, Unit(*spec["units"][number]))
        for number in mine
        if not _summary_path(folder, number).is_file()
    ]


def _job_request(config: DataConfig, spec: dict, job: Job, store_dir: str | Path) -> dict:
    return {
        "unit": asdict(job.unit),
        "rules": {key: spec[key] for key in TextRules.__dataclass_fields__},
        "folder": str(dataset_folder(store_dir, job.dataset) / "shards"),
        "name": f"{job.number:05d}",
        "limit": config.max_bad_records if config.on_bad_record == "skip" else 0,
        "drop": list(job.drop),
    }


def make_handler(setup: dict) -> Callable[[dict], tuple[dict, list]]:
    """Worker side: prepare the unit a request describes (worker side)."""
    tokenizer = Tokenizer.from_json(setup["tokenizer"])

    def handle(request: dict) -> tuple[dict, list]:
        summary = build_shard(
            Unit(**request["unit"]),
            TextRules(**request["rules"]),
            tokenizer,
            Path(request["folder"]),
            request["name"],
            request["limit"],
            frozenset(request["drop"]),
        )
        return {key: summary[key] for key in ("rows", "tokens", "rejected")}, []

    return handle


def _run_jobs(
    config: DataConfig,
    specs: dict[str, dict],
    jobs: list[Job],
    tokenizer: Tokenizer,
    store_dir: str | Path,
    num_processes: int,
    on_progress: Callable[[Progress], None],
) -> None:
    requests = [_job_request(config, specs[job.dataset], job, store_dir) for job in jobs]
    records = tokens = rejected = 0
    started = time.monotonic()
    for done, (job, answer) in enumerate(zip(jobs, _answers(requests, tokenizer, num_processes)), start=1):
        records, tokens, rejected = (
            records + answer["rows"],
            tokens + answer["tokens"],
            rejected + answer["rejected"],
        )
        on_progress(
            Progress(job.dataset, done, len(jobs), records, tokens, rejected, time.monotonic() - started)
        )
        if rejected > config.max_bad_records:
            raise _too_many(config, rejected)


def _answers(requests: list[dict], tokenizer: Tokenizer, num_processes: int) -> Iterator[dict]:
    setup = {"tokenizer": tokenizer.to_json()}
    if num_processes == 0 or len(requests) < 2:
        handle = make_handler(setup)
        yield from (handle(request)[0] for request in requests)
        return
    workers = [Worker(make_handler, setup) for _ in range(min(num_processes, len(requests)))]
    try:
        yield from _dispatch(workers, requests)
    finally:
        for worker in workers:
            worker.close()


def _dispatch(workers: list[Worker], requests: Iterable[dict]) -> Iterator[dict]:
    # two requests per worker: the next unit is there when one ends, and none waits long behind a slow one
    queue = list(requests)
    for number, request in enumerate(queue):
        if number < 2 * len(workers):
            workers[number % len(workers)].send(request)
    for number in range(len(queue)):
        answer, _ = workers[number % len(workers)].receive()
        if number + 2 * len(workers) < len(queue):
            workers[number % len(workers)].send(queue[number + 2 * len(workers)])
        yield answer


def _too_many(config: DataConfig, rejected: int) -> DataError:
    rule = f"is more than data.max_bad_records = {config.max_bad_records}"
    return DataError(
        "rejected records",
        rejected,
        rule,
        "see the *.rejects.jsonl files beside the shards; correct the data or raise the limit",
    )


def _finish(
    config: DataConfig, name: str, spec: dict, tokenizer: Tokenizer, store_dir: str | Path
) -> dict | None:
    """Finish a dataset if all its units are complete; None if some are still missing (an array job of others)."""
    folder = dataset_folder(store_dir, name)
    manifest = read_json(folder / "manifest.json")
    if manifest is not None:
        return manifest
    summaries = _summaries(folder, spec)
    if summaries is None:
        return None
    duplicates = duplicate_lines(folder, summaries)
    if duplicates:
        _drop_duplicates(config, name, spec, tokenizer, store_dir, duplicates)
        summaries = _summaries(folder, spec)
        assert summaries is not None
    rejected = sum(summary["rejected"] for summary in summaries)
    if rejected > config.max_bad_records:
        raise _too_many(config, rejected)
    return finish_dataset(folder, name, spec, summaries)


def _summaries(folder: Path, spec: dict) -> list[dict] | None:
    found = [read_json(_summary_path(folder, number)) for number in range(len(spec["units"]))]
    return None if any(summary is None for summary in found) else found  # type: ignore[return-value]


def _drop_duplicates(
    config: DataConfig,
    name: str,
    spec: dict,
    tokenizer: Tokenizer,
    store_dir: str | Path,
    duplicates: dict[int, list[int]],
) -> None:
    """Write the shards that hold repeated ids again without them (with `stop`, the first one is an error instead)."""
    handle = make_handler({"tokenizer": tokenizer.to_json()})
    for number, lines in duplicates.items():
        handle(
            _job_request(
                config, spec, Job(name, number, Unit(*spec["units"][number]), tuple(lines)), store_dir
            )
        )


if __name__ == "__main__":
    run_worker(make_handler)
