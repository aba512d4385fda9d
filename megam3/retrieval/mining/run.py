"""Mining from files to a file: pool and known positives, index, then the records, part by part.

    WORK/  pool-X/  known-X.npy  index-X/  parts-X/

X is a digest of what each was made from: nothing is ever mixed, and a second model finds the texts in place.

    OUTPUT.jsonl, OUTPUT.jsonl.report.json

All ranks call `mine` together; rank 0 writes what is written once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megam3.data.record import Record
from megam3.data.shard import text_hash
from megam3.data.source import ForwardReader, Unit, find_files
from megam3.dist import comm
from megam3.embedder import M3Embedder
from megam3.errors import DataError
from megam3.files import write_json
from megam3.retrieval.index.build import EncodeOptions, build_index, model_fingerprint
from megam3.retrieval.index.layout import PassageIndex
from megam3.retrieval.index.nearest import build_approximate
from megam3.retrieval.index.pool import TextPool, open_pool, write_pool
from megam3.retrieval.index.search import SearchOptions, find_candidates, score_passages
from megam3.retrieval.index.vectors import TextVectors, encode_vectors, join_vectors
from megam3.retrieval.mining.known import KnownPositives, open_known_positives, write_known_positives
from megam3.retrieval.mining.report import MAX_EXAMPLES, Counts, add_up, report_of
from megam3.retrieval.mining.select import KEPT, REASONS, Selection, SelectOptions, select_negatives
from megam3.retrieval.parts import PART_BYTES, Emit, digest, join_parts, map_units, on_main, refuse_existing
from megam3.retrieval.records import corpus_files, pairs_of, passages_of, read_pairs, units_of
from megam3.retrieval.topk import NO_ROW

logger = logging.getLogger(__name__)
QUERIES_AT_ONCE = 1024
"""More make better use of a shard that was read; 1024 × 210 scores and rows are 2.6 MB."""


@dataclass(frozen=True, kw_only=True)
class MiningOptions:
    """What is mined and how; everything but the places is part of the work folder's spec."""

    inputs: tuple[str, ...]
    """Training records."""
    output: Path
    work: Path
    corpus: tuple[str, ...] = ()
    """Files of passages; none: the positives and negatives of the training records are the pool."""
    model: str
    search: SearchOptions
    select: SelectOptions
    encode: EncodeOptions
    query_max_tokens: int = 512
    query_instruction: str = ""
    with_scores: bool = True
    """Write pos_scores and neg_scores."""
    keep_negatives: bool = False
    """Keep the negatives that a record has, before the mined ones."""


Report = Callable[[str, int, int], None]
"""Takes what is being done, how much of it this rank has done, and how much there is."""


def mine(embedder: M3Embedder, options: MiningOptions, on_progress: Report | None = None) -> dict[str, Any]:
    """Write the records with mined negatives, and the report, which is returned.

    Raises:
        ConfigError: options that cannot be, or that need a head which the model does not have.
        DataError: bad input (`file:line`), an output that exists, fewer passages than the range asks for, or
            no negative for any query.
    """
    options.select.check()
    embedder.require_heads(options.search.needed_heads, "--candidates")
    refuse_existing(options.output)
    files = find_files(list(options.inputs), "input")
    sources = corpus_files(options.corpus, "--corpus") if options.corpus else files
    options.work.mkdir(parents=True, exist_ok=True)
    pool, known = _prepare(options.work, files, sources)
    check_range(len(pool), options.select)
    told = on_progress or (lambda what, done, total: None)
    model = on_main(lambda: model_fingerprint(options.model))
    folder = options.work / f"index-{digest(model, pool.fingerprint, _encode_settings(options.encode))}"
    index = build_index(
        embedder, pool, folder, model, options.encode, lambda done, total: told("encoding", done, total)
    )
    how = options.search.dense_search
    if how in ("ivf", "hnsw"):
        on_main(lambda: str(build_approximate(index, how)))
    miner = _Miner(embedder, index, pool, known, options)
    units = units_of(files, PART_BYTES)
    parts = options.work / f"parts-{_parts_digest(options, files, index)}"
    map_units(units, parts, miner.mine_unit, lambda done, total: told("mining", done, total))
    total = add_up(join_parts(len(units), parts, options.output))
    return _finish(options, pool, total)


def check_range(num_passages: int, options: SelectOptions) -> None:
    """Raises DataError when the range begins beyond the last passage; logs when it ends there."""
    if num_passages <= options.low:
        rule = f"fewer passages than the range {options.low}-{options.high} begins after"
        raise DataError("corpus", num_passages, rule, "give a larger corpus, or lower --range")
    if num_passages < options.high:
        text = "the corpus has %d passages: the range ends there, not at %d"
        logger.warning(text, num_passages, options.high)


def _encode_settings(options: EncodeOptions) -> dict[str, Any]:
    return {name: value for name, value in asdict(options).items() if name != "batch_tokens"}


def _stamp(files: Sequence[str]) -> list[str]:
    """Names, sizes and times of change: an edited file is another input."""
    return [f"{name} {Path(name).stat().st_size} {Path(name).stat().st_mtime_ns}" for name in files]


def _parts_digest(options: MiningOptions, files: Sequence[str], index: PassageIndex) -> str:
    """Of everything that decides on a part's text, so that parts of other settings are never joined."""
    search = asdict(options.search) | {"weights": options.search.weights.model_dump(), "device": ""}
    return digest(
        _stamp(files),
        asdict(index.spec),
        asdict(options.select),
        search,
        [options.query_max_tokens, options.query_instruction, options.with_scores, options.keep_negatives],
    )


def _prepare(work: Path, files: Sequence[str], sources: Sequence[str]) -> tuple[TextPool, KnownPositives]:
    """Pool and known positives, made by rank 0 unless they are there."""
    pairs_file = work / f"known-{digest(_stamp(files))}.npy"
    pool_folder = work / f"pool-{digest(_stamp(sources))}"
    if comm.is_main():
        # first: it reads every training record, so that a bad line is found before anything long begins
        if not pairs_file.exists():
            write_known_positives(pairs_of(files), pairs_file)
        if not pool_folder.is_dir():
            write_pool(passages_of(sources), pool_folder)
    comm.barrier()
    return open_pool(pool_folder), open_known_positives(pairs_file)


def _finish(options: MiningOptions, pool: TextPool, total: Counts) -> dict[str, Any]:
    about = {
        "output": str(options.output),
        "passages": len(pool),
        "duplicate_passages": pool.num_duplicates,
        "empty_passages": pool.num_empty,
        "ranked_by": options.search.by,
        "select": asdict(options.select),
    }
    report = report_of(total, about)
    if comm.is_main():
        write_json(options.output.with_name(f"{options.output.name}.report.json"), report)
    if total.queries and total.without == total.queries:
        rule = f"none of {total.queries} queries got a negative; see its report"
        raise DataError("output", str(options.output), rule, "loosen the filters, or widen --range")
    return report


class _Miner:
    """What the mining of every unit shares."""

    def __init__(
        self,
        embedder: M3Embedder,
        index: PassageIndex,
        pool: TextPool,
        known: KnownPositives,
        options: MiningOptions,
    ):
        self.embedder, self.index, self.pool, self.known, self.options = embedder, index, pool, known, options
        self.reader = ForwardReader()
        self.by_hash = np.argsort(pool.hashes)
        """8 bytes a passage, as the writing of a pool takes."""

    def mine_unit(self, unit: Unit, emit: Emit) -> dict[str, Any]:
        """Emit the records of one unit with their negatives; returns the counts."""
        counts = Counts()
        records = read_pairs(unit, self.reader)
        while block := list(islice(records, QUERIES_AT_ONCE)):
            for record in self._mine_block(block, counts):
                emit(record)
        return asdict(counts)

    def _mine_block(self, block: list[tuple[dict, Record]], counts: Counts) -> Iterator[dict]:
        options = self.options
        queries = [record.query or "" for _, record in block]
        positives = [list(record.passages[: record.num_positives]) for _, record in block]
        query_vectors = self._encode(
            [
                (record.prompt or options.query_instruction) + query
                for (_, record), query in zip(block, queries)
            ],
            options.query_max_tokens,
        )
        own = self._positives([text for texts in positives for text in texts])
        hits = find_candidates(self.index, query_vectors, options.search)
        first = 0
        for n, (parsed, _) in enumerate(block):
            mine = own.select(range(first, first + len(positives[n])))
            first += len(positives[n])
            positive_scores = score_passages(query_vectors, n, mine, options.search)
            found = hits.rows_QK[n].numpy() != NO_ROW
            rows, scores = hits.rows_QK[n].numpy()[found], hits.scores_QK[n].numpy()[found]
            query_hash = text_hash(queries[n])
            selection = select_negatives(
                scores,
                self.pool.hashes[rows],
                positive_scores,
                self.known.of(query_hash),
                query_hash,
                options.select,
            )
            counts.add(selection.reasons, len(selection.chosen), options.select.negatives)
            counts.add_scores(positive_scores, scores[selection.chosen])
            if len(counts.examples) < MAX_EXAMPLES:
                counts.examples.append(self._example(queries[n], positives[n], selection, rows, scores))
            yield self._record(parsed, positive_scores, rows[selection.chosen], scores[selection.chosen])

    def _positives(self, texts: list[str]) -> TextVectors:
        """Representations of positives: those that the pool holds (all of them, without --corpus) lie in the
        index, the others are encoded."""
        hashes = np.array([text_hash(text) for text in texts], dtype=np.int64)
        place = np.searchsorted(self.pool.hashes, hashes, sorter=self.by_hash).clip(max=len(self.pool) - 1)
        row_P = self.by_hash[place]
        is_held_P = self.pool.hashes[row_P] == hashes
        held = np.unique(row_P[is_held_P])
        others = [text for text, is_held in zip(texts, is_held_P) if not is_held]
        parts = [self.index.gather(held)] if len(held) else []
        if others:
            encode = self.options.encode
            parts.append(self._encode([encode.instruction + text for text in others], encode.max_tokens))
        wanted = np.where(is_held_P, np.searchsorted(held, row_P), len(held) + np.cumsum(~is_held_P) - 1)
        return join_vectors(parts).select(wanted.tolist())

    def _encode(self, texts: list[str], max_tokens: int) -> TextVectors:
        search = self.options.search
        return encode_vectors(
            self.embedder,
            texts,
            max_tokens=min(max_tokens, self.embedder.max_tokens),
            batch_tokens=self.options.encode.batch_tokens,
            lexical=search.needs_lexical,
            new_multi=(lambda shape: np.zeros(shape, dtype=np.float32))
            if search.needs_multi_vector
            else None,
        )

    def _record(
        self, parsed: dict, positive_scores: np.ndarray, rows: np.ndarray, scores: np.ndarray
    ) -> dict[str, Any]:
        mined = [self.pool.text(row) for row in rows.tolist()]
        kept = list(parsed.get("neg") or []) if self.options.keep_negatives else []
        record = {key: value for key, value in parsed.items() if key not in ("pos_scores", "neg_scores")}
        record["neg"] = kept + [text for text in mined if text not in kept]
        # scores for some passages only would be no teacher scores: kept negatives have none
        if self.options.with_scores and not kept:
            record["pos_scores"] = [round(float(s), 6) for s in positive_scores]
            record["neg_scores"] = [round(float(s), 6) for s in scores]
        return record

    def _example(
        self, query: str, positives: list[str], selection: Selection, rows: np.ndarray, scores: np.ndarray
    ) -> dict[str, Any]:
        def shown(place: int) -> dict[str, Any]:
            text = self.pool.text(int(rows[place]))[:200]
            return {"rank": place, "score": round(float(scores[place]), 4), "text": text}

        filters = [n for n, name in enumerate(REASONS) if name not in (KEPT, "out of range")]
        out = np.flatnonzero(np.isin(selection.reasons, filters))[:3]
        return {
            "query": query[:200],
            "positive": positives[0][:200],
            "negatives": [shown(int(place)) for place in selection.chosen[:3]],
            "taken_out": [shown(int(p)) | {"reason": REASONS[selection.reasons[p]]} for p in out],
        }
