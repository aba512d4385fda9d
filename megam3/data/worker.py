"""Worker side of the loader: open the store, lay out the same plan, assemble the share of one rank.

Imports neither torch nor transformers, so that a worker answers within a second of its start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from megam3.config.schema import DataConfig
from megam3.data.assemble import Assembler, Shuffle, TextFrame, draft_to_frame
from megam3.data.plan import Plan, build_plan
from megam3.data.process import Handler, run_worker
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
        shape = (dataset.name, dataset.task, dataset.weight, dataset.in_batch_negatives, size, stored.is_text)
        rows.append(DatasetRows(*shape, stored.languages, stored.runs, first))
        first += stored.num_rows
    return rows


def fingerprint_of(tokenizer: str, opened: Sequence[StoredDataset], plan: Plan) -> str:
    """What a checkpoint keeps: equal fingerprints serve equal batches. A hash each of tokenizer, data and plan: a change has a name.

    >>> changed_parts("tokenizer:aa data:bb plan:cc", "tokenizer:aa data:b2 plan:c2")
    ['data']
    """
    data = hashlib.blake2b(
        " ".join(stored.manifest["fingerprint"] for stored in opened).encode(), digest_size=16
    ).hexdigest()
    return f"tokenizer:{tokenizer} data:{data} plan:{plan.fingerprint}"


def changed_parts(saved: str, now: str) -> list[str]:
    """Parts in which two fingerprints differ: tokenizer, data, plan. The plan follows from the others; alone it means itself."""
    before, after = (dict(part.partition(":")[::2] for part in text.split()) for text in (saved, now))
    changed = [name for name in after if before.get(name) != after[name]]
    return [name for name in changed if name != "plan"] or changed


def make_assembler(
    config: DataConfig, plan: Plan, opened: Sequence[StoredDataset], frame: TextFrame
) -> Assembler:
    """The assembler with the recipe's shuffle and packing."""
    shuffle = Shuffle(config.segment_shuffle_probability, config.segment_shuffle_min_tokens)
    return Assembler(plan, opened, frame, shuffle, config.pack_texts_tokens)


def make_handler(setup: dict) -> Handler:
    """Handler of {"number": n}: the share of the setup's rank in batch n (worker side).

    Raises:
        DataError: the store changed between the parent's opening it and ours.
    """
    config = DataConfig.model_validate_json(setup["config"])
    opened = open_all(config, setup["store_dir"])
    plan = build_plan(config, describe(config, opened), setup["seed"])
    if fingerprint_of(setup["tokenizer"], opened, plan) != setup["fingerprint"]:
        raise DataError(
            "data.store_dir",
            setup["store_dir"],
            "was changed while a run was reading it",
            "prepare into another folder",
        )
    prefix, suffix, instruction_tokens = (tuple(ids) for ids in setup["frame"])
    assembler = make_assembler(config, plan, opened, TextFrame(prefix, suffix, instruction_tokens))
    return lambda request: draft_to_frame(
        assembler.draft(request["number"], setup["rank"], setup["world_size"])
    )


if __name__ == "__main__":
    run_worker(make_handler)
