"""`megam3 inspect-batch RECIPE --step N`: the batches of any step as text: rows, their files, drawn
passages."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from megam3.checkpoint import skipped_ranges
from megam3.commands.recipe import add_recipe, local_config
from megam3.data.assemble import BatchArrays
from megam3.data.dataset import TrainingData, open_training_data
from megam3.data.report import batch_facts, batch_text
from megam3.data.tokenizer import Tokenizer, load_tokenizer
from megam3.data.trace import batches_of_step, source_of


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megam3 inspect-batch", description=__doc__)
    add_recipe(parser)
    parser.add_argument("--step", type=int, default=0, help="optimizer step, from 0")
    parser.add_argument(
        "--plan", action="store_true", help="count the plan's steps: also those that a run has gone round"
    )
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--characters", type=int, default=200, help="text shown of each query and passage")
    parser.add_argument("--json", action="store_true", help="the batches as one JSON document")
    return parser


def main(argv: Sequence[str]) -> int:
    """Print one rank's share of the batches of a step.

    Raises:
        UserError: of the recipe or its data.
    """
    arguments = _parser().parse_intermixed_args(argv)
    config = local_config(arguments, weights=False)
    tokenizer = load_tokenizer(config.model.path)
    data = open_training_data(config.data, tokenizer, config.store_dir, config.train.seed)
    data.check_world_size(arguments.world_size)
    skipped = [] if arguments.plan else skipped_ranges(str(config.run_dir), data.fingerprint)
    batches = []
    for number in batches_of_step(data, arguments.step, skipped):
        share = data.assembler().share(number, arguments.rank, arguments.world_size)
        planned = data.plan.batch(number)
        batches.append((planned, list(share_facts(data, tokenizer, share, arguments.characters))))
    if arguments.json:
        facts = {
            "step": arguments.step,
            "rank": arguments.rank,
            "ranks": arguments.world_size,
            "left_out": [{"first": first + 1, "last": stop} for first, stop in skipped],
            "batches": [{**batch_facts(data.plan, planned), "share": share} for planned, share in batches],
        }
        print(json.dumps(facts, indent=2, ensure_ascii=False))
        return 0
    for first, stop in skipped:
        print(f"steps {first + 1} to {stop} of the plan are left out: the run has gone round them")
    for planned, groups in batches:
        print(f"{batch_text(data.plan, planned)}; rank {arguments.rank} of {arguments.world_size}:")
        for group in groups:
            print("\n".join(_lines(group)))
    return 0


def share_facts(
    data: TrainingData, tokenizer: Tokenizer, share: BatchArrays, characters: int
) -> Iterator[dict[str, Any]]:
    """Every query and its passages, or every sequence and its documents, for programs."""
    texts = [_text_facts(tokenizer, ids, characters) for ids in share.texts()]
    if share.is_text:
        yield from _sequence_facts(data, share, texts)
        return
    num_queries = len(share.rows)
    positives = share.positive_counts.tolist() or [1] * num_queries
    for query, (row, num_positives) in enumerate(zip(share.rows.tolist(), positives, strict=True)):
        first, stop = share.group_offsets[query : query + 2].tolist()
        passages = []
        for index in range(first, stop):
            kind = "positive" if index < first + num_positives else "negative"
            score = {"teacher_score": float(share.scores[index])} if len(share.scores) else {}
            passages.append({"kind": kind, **score, **texts[num_queries + index]})
        yield {"row": row, "source": source_of(data, row), "query": texts[query], "passages": passages}


def _sequence_facts(
    data: TrainingData, share: BatchArrays, texts: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    rows = iter(share.rows.tolist())
    for text, size in zip(texts, share.group_sizes, strict=True):
        documents = [{"row": row, "source": source_of(data, row)} for row in islice(rows, size)]
        yield {"documents": documents, "sequence": text}


def _text_facts(tokenizer: Tokenizer, ids: np.ndarray, characters: int) -> dict[str, Any]:
    shown = textwrap.shorten(tokenizer.decode(ids, skip_special_tokens=True), characters, placeholder=" …")
    return {"tokens": len(ids), "text": shown}


def _lines(group: dict[str, Any]) -> Iterator[str]:
    """A query and its passages, or a sequence and its documents, for a person."""
    for document in group.get("documents", [group]):
        yield f"row {document['row']} from {document['source']}"
    if "sequence" in group:
        yield f"  text     {_shown(group['sequence'])}"
        return
    yield f"  query    {_shown(group['query'])}"
    for passage in group["passages"]:
        score = f" (teacher {passage['teacher_score']:.3f})" if "teacher_score" in passage else ""
        yield f"  {passage['kind']}{score} {_shown(passage)}"


def _shown(text: dict[str, Any]) -> str:
    return f"[{text['tokens']} tokens] {text['text']}"
