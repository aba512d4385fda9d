"""`megam3 inspect-batch RECIPE --step N`: the batches of any step as text: rows, their files, drawn
passages."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from megam3.commands.prepare import store_folder
from megam3.config.load import load_config
from megam3.data.assemble import BatchArrays
from megam3.data.dataset import TrainingData, open_training_data
from megam3.data.report import batch_text
from megam3.data.source import place
from megam3.data.tokenizer import Tokenizer, load_tokenizer


def main(argv: Sequence[str]) -> int:
    """Print one rank's share of the batches of a step.

    Raises:
        UserError: of the recipe or its data.
    """
    parser = argparse.ArgumentParser(prog="megam3 inspect-batch", description=__doc__)
    parser.add_argument("recipe", help="a YAML file, or the name of a packaged recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields that win over the recipe")
    parser.add_argument("--step", type=int, default=0, help="optimizer step, from 0")
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--characters", type=int, default=200, help="text shown of each query and passage")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.recipe, arguments.overrides)
    tokenizer = load_tokenizer(config.model.path)
    data = open_training_data(config.data, tokenizer, store_folder(config), config.train.seed)
    data.check_world_size(arguments.world_size)
    size = config.data.batch.accumulation_steps
    for number in range(arguments.step * size, (arguments.step + 1) * size):
        share = data.assembler().share(number, arguments.rank, arguments.world_size)
        print(
            batch_text(data.plan, data.plan.batch(number))
            + f"; rank {arguments.rank} of {arguments.world_size}:"
        )
        print("\n".join(describe_share(data, tokenizer, share, arguments.characters)))
    return 0


def describe_share(
    data: TrainingData, tokenizer: Tokenizer, share: BatchArrays, characters: int
) -> Iterator[str]:
    """Lines about every query and its passages, or every sequence and its documents."""
    if share.is_text:
        yield from _describe_sequences(data, tokenizer, share, characters)
        return
    texts, num_queries = share.texts(), len(share.rows)
    passage = num_queries
    for query, (row, size) in enumerate(zip(share.rows.tolist(), share.group_sizes)):
        yield f"row {row} from {source_of(data, row)}"
        yield f"  query    {_text(tokenizer, texts[query], characters)}"
        for index in range(passage, passage + size):
            kind = "positive" if index == passage else "negative"
            score = f" (teacher {share.scores[index - num_queries]:.3f})" if len(share.scores) else ""
            yield f"  {kind}{score} {_text(tokenizer, texts[index], characters)}"
        passage += size


def _describe_sequences(
    data: TrainingData, tokenizer: Tokenizer, share: BatchArrays, characters: int
) -> Iterator[str]:
    rows, texts = iter(share.rows.tolist()), share.texts()
    for index, size in enumerate(share.group_sizes):
        yield from (f"row {row} from {source_of(data, row)}" for row in islice(rows, size))
        yield f"  text     {_text(tokenizer, texts[index], characters)}"


def source_of(data: TrainingData, row: int) -> str:
    """`file:line` that a row was read from."""
    index = max(i for i, shape in enumerate(data.plan.datasets) if shape.first_row <= row)
    stored = data.datasets[index]
    shard, position = stored.shard_of(row - data.plan.datasets[index].first_row)
    unit = stored.manifest.spec.units[shard]
    return place(unit, int(stored.shard(shard).columns["line"][position]))


def _text(tokenizer: Tokenizer, ids: np.ndarray, characters: int) -> str:
    shown = textwrap.shorten(tokenizer.decode(ids, skip_special_tokens=True), characters, placeholder=" …")
    return f"[{len(ids)} tokens] {shown}"
