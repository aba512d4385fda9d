"""A corpus that a person searches: files indexed once with an exported model, queried in five modes.

    CORPUS.index/  pool-DIGEST/      the texts           index-DIGEST/   their representations

The digests are of what the folders were made from: changed files or another model make new ones beside them,
and the same command continues an index that was interrupted.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from megam3.config.schema import EvaluationConfig
from megam3.embedder import M3Embedder
from megam3.retrieval.evaluate import offered_modes
from megam3.retrieval.index.build import EncodeOptions, build_index, model_fingerprint
from megam3.retrieval.index.layout import PassageIndex
from megam3.retrieval.index.modes import FIVE_MODES, ModeOptions, rows_encoder, search_modes
from megam3.retrieval.index.pool import TextPool, open_pool, write_pool
from megam3.retrieval.index.vectors import encode_vectors
from megam3.retrieval.matches import Segment, matched_segments
from megam3.retrieval.parts import digest
from megam3.retrieval.records import corpus_files, passages_of
from megam3.retrieval.topk import NO_ROW

Report = Callable[[str, int, int], None]
"""Takes what is being done, how much of it is done, and how much there is."""


@dataclass(frozen=True, kw_only=True)
class FoundPassage:
    """One line of a ranking."""

    row: int
    """Of the passage among the corpus' distinct texts."""
    score: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one query found."""

    query: str
    rankings: dict[str, list[FoundPassage]]
    """By mode, best first."""
    segments: dict[int, list[Segment]]
    """Row of each passage found -> its text in pieces, with what each contributed."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Texts, their index and the model that both queries and passages go through."""

    embedder: M3Embedder
    pool: TextPool
    index: PassageIndex
    config: EvaluationConfig
    batch_tokens: int | None = None
    """Encoded at a time; None: what suits the device."""
    lock: threading.Lock
    """One query at a time: a model shares its buffers between calls."""

    def search(self, query: str, num_hits: int) -> Answer:
        """The best passages in every mode that the model has the heads for, and which of their words matched.

        Raises:
            DataError: the index on disk is damaged.
        """
        heads = self.embedder.heads
        offered = [mode for mode in FIVE_MODES if mode in offered_modes(heads)]
        asked = (self.config.query_instruction or "") + query
        with self.lock:
            encoded = encode_vectors(
                self.embedder,
                [asked],
                max_tokens=min(self.config.query_max_tokens, self.embedder.max_tokens),
                lexical="lexical" in heads,
                new_multi=_in_memory if "multi_vector" in heads else None,
            )
            options = ModeOptions(config=self.config, modes=offered, device=str(self.embedder.device))
            encode_rows = rows_encoder(self.embedder, self.pool, self.index, self.batch_tokens)
            hits = search_modes(self.index, encoded, options, encode_rows)
            rankings = {
                mode: [
                    FoundPassage(row=row, score=score, text=self.pool.text(row))
                    for row, score in zip(
                        hits[mode].rows_QK[0, :num_hits].tolist(), hits[mode].scores_QK[0, :num_hits].tolist()
                    )
                    if row != NO_ROW
                ]
                for mode in offered
            }
            texts = {found.row: found.text for ranking in rankings.values() for found in ranking}
            pieces = matched_segments(
                self.embedder,
                asked,
                list(texts.values()),
                max_tokens=self.index.spec.max_tokens,
                instruction=self.index.spec.instruction,
            )
        return Answer(query=query, rankings=rankings, segments=dict(zip(texts, pieces)))


def _in_memory(shape: tuple[int, int]) -> np.ndarray:
    return np.empty(shape, dtype=np.float32)


def open_corpus(
    embedder: M3Embedder,
    model: str,
    files: Sequence[str],
    folder: Path,
    options: EncodeOptions,
    config: EvaluationConfig,
    on_progress: Report | None = None,
) -> Corpus:
    """Index the passages of `files` in `folder`, or open what is there already.

    Args:
        model: the folder the embedder was read from; its files decide whether an index is still good.
        files: JSONL with `text` (and `title`), training records, or folders in BEIR format.

    Raises:
        DataError: no such files, a bad record (`file:line`), no passage, or a damaged index.
    """
    told = on_progress or (lambda what, done, total: None)
    sources = corpus_files(list(files), "corpus")
    stamps = [[str(Path(f).resolve()), Path(f).stat().st_size, Path(f).stat().st_mtime_ns] for f in sources]
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"pool-{digest(stamps)}"
    pool = open_pool(place) if place.is_dir() else write_pool(passages_of(sources), place)
    held = embedder.heads
    options = replace(
        options,
        lexical=options.lexical and "lexical" in held,
        multi_vector=options.multi_vector and "multi_vector" in held,
    )
    fingerprint = model_fingerprint(model)
    settings = {name: value for name, value in asdict(options).items() if name != "batch_tokens"}
    index = build_index(
        embedder,
        pool,
        folder / f"index-{digest(fingerprint, pool.fingerprint, settings)}",
        fingerprint,
        options,
        lambda done, total: told("shards encoded", done, total),
    )
    return Corpus(
        embedder=embedder,
        pool=pool,
        index=index,
        config=config,
        batch_tokens=options.batch_tokens,
        lock=threading.Lock(),
    )
