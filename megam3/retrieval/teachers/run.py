"""Write a teacher's scores into training records: `pos_scores` and `neg_scores`, one number a passage.

Records stream through in parts (`megam3.retrieval.parts`); within a part, blocks of pairs are scored
together, so that batches hold pairs of like lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megam3.data.record import Record
from megam3.data.source import ForwardReader, Unit, find_files
from megam3.errors import TrainingError
from megam3.retrieval.index.build import model_fingerprint
from megam3.retrieval.parts import PART_BYTES, Emit, digest, join_parts, map_units, on_main, refuse_existing
from megam3.retrieval.records import read_pairs, units_of
from megam3.retrieval.teachers.base import Pair, Teacher, score_unique

PAIRS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """What is scored; `settings` is everything about the teacher that decides on a score."""

    inputs: tuple[str, ...]
    output: Path
    work: Path
    model: str
    settings: dict
    normalize: bool = False
    """Put scores through a sigmoid, as FlagEmbedding's --normalize does."""
    query_instruction: str = ""
    passage_instruction: str = ""


def add_teacher_scores(
    teacher: Teacher, options: TeacherOptions, on_progress: Callable[[int, int], None] | None = None
) -> dict[str, int]:
    """Write the records with scores; all ranks call it together.

    Returns:
        Counts: `records` and `pairs`.

    Raises:
        DataError: bad input (`file:line`), or an output that exists.
        TrainingError: a score that is not finite.
    """
    refuse_existing(options.output)
    files = find_files(list(options.inputs), "input")
    units = units_of(files, PART_BYTES)
    stamps = [f"{name} {Path(name).stat().st_size} {Path(name).stat().st_mtime_ns}" for name in files]
    model = on_main(lambda: model_fingerprint(options.model))
    made_from = digest(
        stamps,
        model,
        options.settings,
        options.normalize,
        [options.query_instruction, options.passage_instruction],
    )
    folder = options.work / f"scores-{made_from}"
    with closing(ForwardReader()) as reader:

        def score(unit: Unit, emit: Emit) -> dict[str, int]:
            return _score_unit(teacher, options, read_pairs(unit, reader), emit)

        map_units(units, folder, score, on_progress)
    counts = join_parts(len(units), folder, options.output)
    return {name: sum(part[name] for part in counts) for name in ("records", "pairs")}


def _blocks(records: Iterator[tuple[dict, Record]]) -> Iterator[list[tuple[dict, Record]]]:
    """Records until their pairs reach PAIRS_AT_ONCE."""
    block: list[tuple[dict, Record]] = []
    pairs = 0
    for parsed, record in records:
        block.append((parsed, record))
        pairs += len(record.passages)
        if pairs >= PAIRS_AT_ONCE:
            yield block
            block, pairs = [], 0
    if block:
        yield block


def _score_unit(
    teacher: Teacher, options: TeacherOptions, records: Iterator[tuple[dict, Record]], emit: Emit
) -> dict[str, int]:
    counts = {"records": 0, "pairs": 0}
    for block in _blocks(records):
        pairs = [pair for _, record in block for pair in _pairs(record, options)]
        scores = score_unique(pairs, teacher.score)
        if not np.isfinite(scores).all():
            query = pairs[int(np.flatnonzero(~np.isfinite(scores))[0])][0]
            rule = "gave a score that is not finite"
            raise TrainingError("teacher", query[:80], rule, "try --precision fp32, or another teacher")
        if options.normalize:
            scores = 1 / (1 + np.exp(-scores))
        first = 0
        for parsed, record in block:
            own = [round(float(score), 6) for score in scores[first : first + len(record.passages)]]
            first += len(record.passages)
            positives, negatives = own[: record.num_positives], own[record.num_positives :]
            emit({**parsed, "pos_scores": positives, "neg_scores": negatives})
        counts["records"] += len(block)
        counts["pairs"] += len(pairs)
    return counts


def _pairs(record: Record, options: TeacherOptions) -> Sequence[Pair]:
    query = (record.prompt or options.query_instruction) + (record.query or "")
    return [(query, options.passage_instruction + passage) for passage in record.passages]
