"""BM25 over a pool on disk: how often each token stands in each passage, inverted, shard by shard.

    COUNTS/  spec.json        what the shards were made from
             shards/00000/    terms, offsets, rows, counts: postings of the shard's passages
                              tokens: of each passage, special ones included

The same figures as `retrieval/bm25.py` gives a corpus in memory (Lucene's variant, k1 1.5, b 0.75): a text
that several documents have counts as often in the number of documents that hold a token and in the mean
length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megam3.errors import DataError
from megam3.files import atomic_folder, read_json, write_json
from megam3.retrieval.bm25 import Framing
from megam3.retrieval.index.documents import Documents
from megam3.retrieval.index.layout import Postings, invert, shard_folder
from megam3.retrieval.index.pool import TextPool
from megam3.retrieval.index.search import posting_hits, shifted
from megam3.retrieval.index.vectors import TextVectors, offsets_of
from megam3.retrieval.topk import Hits, empty_hits, merge_hits

Tokenize = Callable[[Sequence[str]], Sequence[np.ndarray]]
"""Texts to token ids, special ones included."""
K1, B = 1.5, 0.75
"""bm25s' defaults."""
SHARD_PASSAGES = 16384


@dataclass(frozen=True, kw_only=True)
class CountsSpec:
    """What token counts were made from."""

    passages: str
    """Fingerprint of the pool."""
    num_passages: int
    max_tokens: int
    tokenizer: str
    """Of the model whose tokenizer it was."""
    num_before: int = 1
    num_after: int = 1
    """Special tokens before and after every text, which are not counted."""

    @property
    def framing(self) -> Framing:
        """Both numbers."""
        return self.num_before, self.num_after


class TokenCounts:
    """Finished counts, mapped shard by shard."""

    def __init__(self, folder: Path, spec: CountsSpec):
        self.folder, self.spec = folder, spec

    @property
    def num_shards(self) -> int:
        """The last one may be shorter."""
        return -(-self.spec.num_passages // SHARD_PASSAGES)

    def postings(self, number: int) -> Postings:
        """Of one shard."""
        return Postings(
            terms_U=self._load(number, "terms"),
            offsets_U1=self._load(number, "offsets"),
            rows_Z=self._load(number, "rows"),
            weights_Z=self._load(number, "counts"),
        )

    def tokens(self) -> np.ndarray:
        """int32 [n]: tokens of each passage of the pool, special ones included."""
        return np.concatenate([self._load(number, "tokens") for number in range(self.num_shards)])

    def _load(self, number: int, name: str) -> np.ndarray:
        file = shard_folder(self.folder, number) / f"{name}.npy"
        try:
            return np.load(file, mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            rule = f"cannot be read ({error})"
            raise DataError("token counts", str(file), rule, "remove its folder and start again") from error


def count_tokens(pool: TextPool, tokenize: Tokenize, folder: Path, spec: CountsSpec) -> TokenCounts:
    """Count the tokens of all passages; shards that are there already stay.

    Raises:
        DataError: the folder holds counts of something else.
    """
    found = read_json(folder / "spec.json") if (folder / "spec.json").exists() else None
    if found is None:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        write_json(folder / "spec.json", asdict(spec))
    elif found != asdict(spec):
        raise DataError(
            "token counts", str(folder), "were made from something else", "remove the folder, or name another"
        )
    counts = TokenCounts(folder, spec)
    for number in range(counts.num_shards):
        if not shard_folder(folder, number).is_dir():
            first = number * SHARD_PASSAGES
            texts = pool.texts(first, min(first + SHARD_PASSAGES, len(pool)))
            with atomic_folder(shard_folder(folder, number)) as aside:
                _write_shard(aside, tokenize(texts), spec.framing)
    return counts


def _write_shard(folder: Path, token_ids: Sequence[np.ndarray], framing: Framing) -> None:
    inner = [_counted(ids, framing) for ids in token_ids]
    postings = invert(
        np.concatenate([ids for ids, _ in inner]).astype(np.int32),
        np.concatenate([counts for _, counts in inner]).astype(np.int32),
        offsets_of([len(ids) for ids, _ in inner]),
    )
    arrays = {
        "terms": postings.terms_U,
        "offsets": postings.offsets_U1,
        "rows": postings.rows_Z,
        "counts": postings.weights_Z,
        "tokens": np.array([len(ids) for ids in token_ids], dtype=np.int32),
    }
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)


def _counted(ids: np.ndarray, framing: Framing) -> tuple[np.ndarray, np.ndarray]:
    """The distinct tokens of a text itself, and how often each stands there."""
    before, after = framing
    return np.unique(ids[before : len(ids) - after], return_counts=True)


def bm25_on_disk(
    counts: TokenCounts, documents: Documents, query_ids: Sequence[np.ndarray], num_hits: int
) -> Hits:
    """The best documents of each query; one without a token in common is no hit."""
    copies = documents.copies
    lengths = counts.tokens() - sum(counts.spec.framing)
    mean_length = float((copies * lengths).sum() / len(documents))
    queries = _weighted_queries(counts, copies, query_ids, len(documents))
    hits = empty_hits(len(query_ids))
    for number in range(counts.num_shards):
        first = number * SHARD_PASSAGES
        of_shard = lengths[first : first + SHARD_PASSAGES]
        norms = K1 * (1 - B + B * of_shard / mean_length)

        def value(rows: np.ndarray, found: np.ndarray, norms: np.ndarray = norms) -> np.ndarray:
            return (found / (found + norms[rows])).astype(np.float32)

        best = posting_hits(counts.postings(number), len(of_shard), queries, num_hits, value)
        hits = merge_hits(hits, shifted(best, first), num_hits)
    return documents.expand(hits, num_hits)


def _weighted_queries(
    counts: TokenCounts, copies: np.ndarray, query_ids: Sequence[np.ndarray], num_documents: int
) -> TextVectors:
    """Each query's tokens, weighing idf for every time they stand in it."""
    per_query = [_counted(np.asarray(ids), counts.spec.framing) for ids in query_ids]
    ids_Z = np.concatenate([ids for ids, _ in per_query]).astype(np.int32)
    terms = np.unique(ids_Z)
    holding = np.zeros(len(terms))
    for number in range(counts.num_shards):
        postings = counts.postings(number)
        own = copies[number * SHARD_PASSAGES :]
        places = np.searchsorted(postings.terms_U, terms)
        for term in np.flatnonzero(places < len(postings.terms_U)):
            if postings.terms_U[places[term]] == terms[term]:
                span = slice(*postings.offsets_U1[places[term] : places[term] + 2].tolist())
                holding[term] += own[postings.rows_Z[span]].sum()
    idf = np.log(1 + (num_documents - holding + 0.5) / (holding + 0.5))
    times_Z = np.concatenate([times for _, times in per_query])
    return TextVectors(
        dense_ND=np.zeros((len(query_ids), 0), dtype=np.float32),
        lexical_ids_Z=ids_Z,
        lexical_weights_Z=(times_Z * idf[np.searchsorted(terms, ids_Z)]).astype(np.float32),
        lexical_offsets_N1=offsets_of([len(ids) for ids, _ in per_query]),
    )
