"""Worker side of the loader: open the store, lay out the same plan, assemble the share of one rank.

Imports neither torch nor transformers, so that a worker answers within a second of its start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megam3.config.schema import DataConfig
from megam3.data.assemble import Assembler, BatchArrays, TextFrame
from megam3.data.plan import Plan, build_plan
from megam3.data.store import StoredDataset, open_dataset
from megam3.data.strata import DatasetRows
from megam3.errors import ConfigError, DataError


def open_all(config: DataConfig, store_dir: str | Path) -> tuple[StoredDataset, ...]:
    """Every dataset of the recipe, in its order.

    Raises:
        ConfigError: two datasets of one name.
        DataError: a dataset that is not prepared, or damaged.
    """
    names = [dataset.name for dataset in config.train]
    if len(set(names)) != len(names):
        raise ConfigError("data.train[].name", names, "must be unique", "rename a dataset")
    return tuple(open_dataset(store_dir, name) for name in names)


def describe(config: DataConfig, opened: Sequence[StoredDataset]) -> list[DatasetRows]:
    """What the plan needs to know of the opened datasets."""
    rows, first = [], 0
    for dataset, stored in zip(config.train, opened):
        size = dataset.passages_per_query or config.passages_per_query
        rows.append(
            DatasetRows(
                name=dataset.name,
                task=dataset.task,
                weight=dataset.weight,
                in_batch_negatives=dataset.in_batch_negatives,
                passages_per_query=size,
                is_text=stored.is_text,
                languages=stored.languages,
                runs=stored.runs,
                first_row=first,
            )
        )
        first += stored.num_rows
    return rows


def fingerprint_of(tokenizer: str, opened: Sequence[StoredDataset], plan: Plan) -> str:
    """What a checkpoint keeps: equal fingerprints serve equal batches. A hash each of tokenizer, data and plan: a change has a name.

    >>> changed_parts("tokenizer:aa data:bb plan:cc", "tokenizer:aa data:b2 plan:c2")
    ['data']
    """
    data = hashlib.blake2b(
        " ".join(stored.manifest.fingerprint for stored in opened).encode(), digest_size=16
    ).hexdigest()
    return f"tokenizer:{tokenizer} data:{data} plan:{plan.fingerprint}"


def changed_parts(saved: str, now: str) -> list[str]:
    """Parts in which two fingerprints differ: tokenizer, data, plan. The plan follows from the others; alone it means itself."""
    before, after = (dict(part.partition(":")[::2] for part in text.split()) for text in (saved, now))
    changed = [name for name in after if before.get(name) != after[name]]
    return [name for name in changed if name != "plan"] or changed


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """All that a worker needs to serve one rank's share of any batch."""

    config: DataConfig
    store_dir: str
    seed: int
    frame: TextFrame
    tokenizer: str
    """The tokenizer's fingerprint."""
    fingerprint: str
    """Of the data as the parent opened it."""
    rank: int
    world_size: int


def make_handler(setup: WorkerSetup) -> Callable[[int], BatchArrays]:
    """Handler of batch numbers (worker side).

    Raises:
        DataError: the store changed between the parent's opening it and ours.
    """
    opened = open_all(setup.config, setup.store_dir)
    plan = build_plan(setup.config, describe(setup.config, opened), setup.seed)
    if fingerprint_of(setup.tokenizer, opened, plan) != setup.fingerprint:
        rule = "was changed while a run was reading it"
        raise DataError("data.store_dir", setup.store_dir, rule, "prepare into another folder")
    assembler = Assembler(setup.config, plan, opened, setup.frame)
    return lambda number: assembler.share(number, setup.rank, setup.world_size)
