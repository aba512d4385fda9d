"""The index of a pool on disk: shards of encoded passages, complete or absent, memory-mapped to be read.

    INDEX/  spec.json            what the shards were made from
            shards/00000/        passages 0 … passages_per_shard-1, in the order of the pool
              dense                                [n, D]
              lexical_{ids, weights, offsets}      by passage: int32, float16, int64
              posting_terms, posting_offsets       inverted: the ids that occur, their first place
              posting_rows, posting_weights        the passages that hold an id, and its weight
              multi, multi_offsets                 float16 [K, C], when multi-vector rows are kept
            dense.ivf            optional approximate index over all shards (nearest.py)

A lexical pair takes 12 bytes (it is stored by passage, to score candidates, and by id, to find them), a dense
vector 2·D in float16.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from megam3.errors import DataError
from megam3.files import read_json, write_json
from megam3.retrieval.index.vectors import TextVectors, join_vectors, offsets_of

FORMAT = 1
MAX_OPEN_SHARDS = 32
"""Each holds about ten file descriptors; 1024 is a common limit."""
_MAX_FLOAT16 = float(np.finfo(np.float16).max)


@dataclass(frozen=True, kw_only=True)
class IndexSpec:
    """What an index was made from; another value of any field needs another index."""

    model: str
    """Fingerprint of weights, config and tokenizer."""
    passages: str
    """Fingerprint of the pool."""
    num_passages: int
    passages_per_shard: int
    max_tokens: int
    """Passages are cut there."""
    instruction: str = ""
    """Put before every passage."""
    dense_dtype: str = "float16"
    """float16 or float32; float16 changes a score by at most 1e-3."""
    lexical: bool = True
    """Whether lexical weights were computed; without them no passage has any."""
    multi_vector: bool = False
    """Whether multi-vector rows are kept."""
    format: int = FORMAT

    @property
    def num_shards(self) -> int:
        """The last one may be shorter."""
        return -(-self.num_passages // self.passages_per_shard)

    def span(self, shard: int) -> tuple[int, int]:
        """First row of a shard, and one past its last."""
        start = shard * self.passages_per_shard
        return start, min(start + self.passages_per_shard, self.num_passages)


@dataclass(frozen=True, kw_only=True)
class Postings:
    """The inverted form of a shard's lexical pairs."""

    terms_U: np.ndarray
    """int32: ids that occur in the shard, ascending."""
    offsets_U1: np.ndarray
    """int64: postings of terms_U[u] are offsets_U1[u] … offsets_U1[u+1]-1."""
    rows_Z: np.ndarray
    """int32: position of the passage in the shard."""
    weights_Z: np.ndarray


@dataclass(frozen=True)
class Shard:
    """One mapped shard."""

    first_row: int
    vectors: TextVectors
    postings: Postings


def invert(ids_Z: np.ndarray, weights_Z: np.ndarray, offsets_N1: np.ndarray) -> Postings:
    """Lexical pairs by passage -> by id."""
    order = np.argsort(ids_Z, kind="stable")
    rows_Z = np.repeat(np.arange(len(offsets_N1) - 1, dtype=np.int32), np.diff(offsets_N1))
    terms, counts = np.unique(ids_Z, return_counts=True)
    return Postings(
        terms_U=terms.astype(np.int32),
        offsets_U1=offsets_of(counts),
        rows_Z=rows_Z[order],
        weights_Z=weights_Z[order],
    )


def write_shard(folder: Path, vectors: TextVectors) -> None:
    """Fill an empty folder; multi-vector rows are written by whoever mapped `multi.npy` there.

    Raises:
        DataError: a lexical weight that float16 cannot hold.
    """
    if vectors.lexical_weights_Z.max(initial=0.0) > _MAX_FLOAT16:
        found = float(vectors.lexical_weights_Z.max())
        raise DataError("lexical weight", found, f"is above {_MAX_FLOAT16:.0f}", "the lexical head is broken")
    weights = vectors.lexical_weights_Z.astype(np.float16)
    postings = invert(vectors.lexical_ids_Z, weights, vectors.lexical_offsets_N1)
    arrays = {
        "dense": vectors.dense_ND,
        "lexical_ids": vectors.lexical_ids_Z,
        "lexical_weights": weights,
        "lexical_offsets": vectors.lexical_offsets_N1,
        "posting_terms": postings.terms_U,
        "posting_offsets": postings.offsets_U1,
        "posting_rows": postings.rows_Z,
        "posting_weights": postings.weights_Z,
    }
    if vectors.multi_offsets_N1 is not None:
        arrays["multi_offsets"] = vectors.multi_offsets_N1
        if not (folder / "multi.npy").exists():
            assert vectors.multi_KC is not None
            arrays["multi"] = vectors.multi_KC.astype(np.float16)
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)


def shard_folder(index: Path, number: int) -> Path:
    """Where shard `number` lies."""
    return index / "shards" / f"{number:05d}"


def claim_index(folder: Path, spec: IndexSpec) -> None:
    """Begin an index with this spec, or continue one that was begun with it.

    Raises:
        DataError: the folder holds an index that was made from something else.
    """
    found = read_spec(folder)
    if found is None:
        (folder / "shards").mkdir(parents=True, exist_ok=True)
        write_json(folder / "spec.json", asdict(spec))
        return
    for field in fields(spec):
        ours, theirs = getattr(spec, field.name), getattr(found, field.name)
        if ours != theirs:
            rule = f"its shards were made with {field.name} {theirs!r}, now it is {ours!r}"
            raise DataError("index", str(folder), rule, "remove the folder, or name another one")


def read_spec(folder: Path) -> IndexSpec | None:
    """The spec of an index; None: there is none.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return IndexSpec(**read_json(folder / "spec.json"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        rule = f"its spec.json cannot be read ({error})"
        raise DataError("index", str(folder), rule, "remove the folder and start again") from error


class PassageIndex:
    """A finished index, mapped shard by shard.

    Raises:
        DataError: no index, or shards are missing.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        spec = read_spec(self.folder)
        if spec is None:
            raise DataError("index", str(folder), "holds no index", "build it first")
        missing = [n for n in range(spec.num_shards) if not shard_folder(self.folder, n).is_dir()]
        if missing:
            rule = f"{len(missing)} of {spec.num_shards} shards are missing, the first is {missing[0]}"
            raise DataError("index", str(folder), rule, "start its building again; what is complete is kept")
        self.spec = spec
        self._open: OrderedDict[int, Shard] = OrderedDict()

    def __len__(self) -> int:
        return self.spec.num_passages

    def shard(self, number: int) -> Shard:
        """Shard `number`, mapped; the least recently used ones are closed.

        Raises:
            DataError: a file is missing or damaged.
        """
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        self._open[number] = self._map(number)
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[number]

    def _map(self, number: int) -> Shard:
        folder = shard_folder(self.folder, number)

        def load(name: str) -> np.ndarray:
            return np.load(folder / f"{name}.npy", mmap_mode="r")

        start, stop = self.spec.span(number)
        try:
            vectors = TextVectors(
                dense_ND=load("dense"),
                lexical_ids_Z=load("lexical_ids"),
                lexical_weights_Z=load("lexical_weights"),
                lexical_offsets_N1=load("lexical_offsets"),
                multi_KC=load("multi") if self.spec.multi_vector else None,
                multi_offsets_N1=load("multi_offsets") if self.spec.multi_vector else None,
            )
            postings = Postings(
                terms_U=load("posting_terms"),
                offsets_U1=load("posting_offsets"),
                rows_Z=load("posting_rows"),
                weights_Z=load("posting_weights"),
            )
            if len(vectors.dense_ND) != stop - start or vectors.num_texts != stop - start:
                raise ValueError(f"it holds {len(vectors.dense_ND)} passages, not {stop - start}")
        except (OSError, EOFError, ValueError) as error:
            rule = f"cannot be read ({error})"
            raise DataError(
                "index shard", str(folder), rule, "remove it and build the index again"
            ) from error
        return Shard(start, vectors, postings)

    def bytes_per_passage(self) -> int:
        """Mean size of a passage's representations, from the first shard."""
        vectors = self.shard(0).vectors
        arrays = (vectors.dense_ND, vectors.lexical_ids_Z, vectors.lexical_weights_Z, vectors.multi_KC)
        return sum(0 if array is None else array.nbytes for array in arrays) // max(vectors.num_texts, 1)

    def gather(self, rows: Sequence[int] | np.ndarray) -> TextVectors:
        """Representations of some passages, copied; `rows` ascend."""
        rows = np.asarray(rows, dtype=np.int64)
        numbers = rows // self.spec.passages_per_shard
        parts = []
        for number in np.unique(numbers).tolist():
            shard = self.shard(number)
            parts.append(shard.vectors.select((rows[numbers == number] - shard.first_row).tolist()))
        return join_vectors(parts)
