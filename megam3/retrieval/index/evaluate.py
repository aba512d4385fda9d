"""Evaluation of a corpus too large for memory: the modes and the figures of `retrieval/evaluate.py`, over
files.

    FOLDER.index/  documents-DIGEST/   texts and ids (documents.py)
                   index-DIGEST/       their representations (layout.py), without multi-vector rows
                   counts-DIGEST/      token counts for BM25 (bm25.py)

The digests are of what the folders were made from; an interrupted evaluation goes on with what is there.
Dense vectors are kept in float32, as in memory; lexical weights in float16.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megam3.config.schema import EvaluationConfig
from megam3.embedder import M3Embedder
from megam3.errors import DataError
from megam3.retrieval.beir import BeirDataset, read_corpus, read_judged
from megam3.retrieval.bm25 import find_framing
from megam3.retrieval.evaluate import MODES, SEARCHED, Searched, check_modes, measure
from megam3.retrieval.index.bm25 import CountsSpec, TokenCounts, bm25_on_disk, count_tokens
from megam3.retrieval.index.build import EncodeOptions, build_index
from megam3.retrieval.index.documents import Documents, open_documents, write_documents
from megam3.retrieval.index.modes import FIVE_MODES, ModeOptions, rows_encoder, search_modes
from megam3.retrieval.index.vectors import encode_vectors
from megam3.retrieval.parts import digest
from megam3.retrieval.results import EvaluationResult
from megam3.retrieval.topk import Hits

ON_DISK_PASSAGES = 200_000
"""Corpora above this size are evaluated from files unless told otherwise: in memory a passage takes about
10 kB at 1024 dimensions, token ids and lexical pairs included."""
_COUNTED_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class DiskTestSet:
    """A test set whose passages lie in files."""

    dataset: BeirDataset
    documents: Documents
    folder: Path
    """Where indexes of it are kept."""


def count_passages(folder: Path) -> int:
    """Lines of a folder's corpus.jsonl; 0 when it is not there."""
    try:
        with (folder / "corpus.jsonl").open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(_COUNTED_BYTES), b""))
    except OSError:
        return 0


def open_test_set(folder: str | Path, split: str, index: Path) -> DiskTestSet:
    """Write the passages of a folder in BEIR format to `index`, unless they are there, and read the rest.

    Raises:
        DataError: as `read_beir`.
    """
    folder = Path(folder)
    corpus = folder / "corpus.jsonl"
    if not corpus.is_file():
        raise DataError("evaluation folder", str(corpus), "is not there", "name a folder in BEIR format")
    stat = corpus.stat()
    place = index / f"documents-{digest(str(corpus.resolve()), stat.st_size, stat.st_mtime_ns)}"
    if place.is_dir():
        documents = open_documents(place)
    else:
        index.mkdir(parents=True, exist_ok=True)
        documents = write_documents(read_corpus(folder, unique=False), place)
    dataset = read_judged(folder, split, documents.ids, documents.texts)
    return DiskTestSet(dataset=dataset, documents=documents, folder=index)


def evaluate_on_disk(
    test_set: DiskTestSet,
    embedder: M3Embedder,
    model: str,
    config: EvaluationConfig,
    modes: Sequence[str] = MODES,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Search in every mode and measure. One process; memory is that of a shard, of GATHERED_BYTES of
    candidates, of the queries, and 60 bytes a document.

    Args:
        model: fingerprint of the embedder's folder (`model_fingerprint`).
        on_progress: called with (shards encoded, shards).

    Raises:
        ConfigError: a name that is no mode.
        CheckpointError: the model's representations are not finite.
        DataError: a file of the index is damaged.
    """
    check_modes(modes)
    started = time.perf_counter()
    limits = [min(n, embedder.max_tokens) for n in (config.query_max_tokens, config.passage_max_tokens)]
    queries = [(config.query_instruction or "") + query for query in test_set.dataset.queries]
    query_ids = embedder.token_arrays(queries, max_tokens=limits[0])
    counts = _counts(test_set, embedder, model, limits[1])
    hits: dict[str, Hits] = {}
    if set(modes) - {"BM25"}:
        hits |= _five_modes(
            test_set, queries, embedder, model, config, [m for m in FIVE_MODES if m in modes], on_progress
        )
    if "BM25" in modes:
        # words that stand before every text tell none from another
        words = query_ids
        if config.query_instruction:
            words = embedder.token_arrays(test_set.dataset.queries, max_tokens=limits[0])
        hits["BM25"] = bm25_on_disk(counts, test_set.documents, words, SEARCHED)
    passage_tokens = counts.tokens()[test_set.documents.pool_rows]
    if config.passage_instruction:
        # before a text: the space at an instruction's end belongs to the text's first word
        pair = [f"{config.passage_instruction}1", "1"]
        with_it, alone = embedder.token_arrays(pair, max_tokens=limits[1])
        passage_tokens = np.minimum(passage_tokens + len(with_it) - len(alone), limits[1])
    searched = Searched(
        hits=hits,
        query_tokens=[len(ids) for ids in query_ids],
        passage_tokens=passage_tokens,
        seconds=time.perf_counter() - started,
    )
    return measure(test_set.dataset, searched, config)


def _counts(test_set: DiskTestSet, embedder: M3Embedder, model: str, max_tokens: int) -> TokenCounts:
    pool = test_set.documents.pool
    before, after = find_framing(
        lambda texts, limit: [ids.tolist() for ids in embedder.token_arrays(texts, max_tokens=limit)],
        max_tokens,
    )
    spec = CountsSpec(
        passages=pool.fingerprint,
        num_passages=len(pool),
        max_tokens=max_tokens,
        tokenizer=model,
        num_before=before,
        num_after=after,
    )
    return count_tokens(
        pool,
        lambda texts: embedder.token_arrays(texts, max_tokens=max_tokens),
        test_set.folder / f"counts-{digest(vars(spec))}",
        spec,
    )


def _five_modes(
    test_set: DiskTestSet,
    queries: Sequence[str],
    embedder: M3Embedder,
    model: str,
    config: EvaluationConfig,
    modes: Sequence[str],
    on_progress: Callable[[int, int], None] | None,
) -> dict[str, Hits]:
    pool = test_set.documents.pool
    options = EncodeOptions(
        max_tokens=min(config.passage_max_tokens, embedder.max_tokens),
        batch_tokens=config.batch_tokens,
        instruction=config.passage_instruction or "",
        dense_dtype="float32",
    )
    # without an instruction the name is that of indexes made before there were any
    made_from = [model, pool.fingerprint, options.max_tokens, *filter(None, [options.instruction])]
    place = test_set.folder / f"index-{digest(*made_from)}"
    index = build_index(embedder, pool, place, model, options, on_progress)
    encoded = encode_vectors(
        embedder,
        queries,
        max_tokens=min(config.query_max_tokens, embedder.max_tokens),
        batch_tokens=config.batch_tokens,
        new_multi=lambda shape: np.empty(shape, dtype=np.float32),
    )
    return search_modes(
        index,
        encoded,
        ModeOptions(config=config, modes=modes, device=str(embedder.device)),
        rows_encoder(embedder, pool, index, config.batch_tokens),
        test_set.documents,
    )
