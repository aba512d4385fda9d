"""The texts of all passages in one file, each once, without a Python object for any of them.

    POOL/  texts.bin    UTF-8 bytes, one text after another
           starts.npy   int64 [n + 1]: text i is bytes starts[i] … starts[i+1]-1
           hashes.npy   int64 [n]: text_hash of each
           pool.json    counts, and the fingerprint of the hashes

Reading needs pages of the files, not the files: 100 million passages cost 1.6 GB of address space for starts
and hashes, and the texts that are looked at. Writing keeps 8 bytes a passage in memory, to know which texts
were there before.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from megam3.data.shard import text_hash
from megam3.errors import DataError
from megam3.files import atomic_folder, read_json, write_json

_BLOCK_TEXTS = 8192


@dataclass(frozen=True, kw_only=True)
class TextPool:
    """Distinct passages, by row."""

    folder: Path
    fingerprint: str
    num_duplicates: int
    """Texts of the input that were there before."""
    num_empty: int
    """Empty texts of the input, left out unless they were asked for."""
    starts: np.ndarray
    hashes: np.ndarray
    blob: np.ndarray

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def num_bytes(self) -> int:
        """Of all texts."""
        return int(self.starts[-1])

    def text(self, row: int) -> str:
        """Passage `row`."""
        return self.blob[self.starts[row] : self.starts[row + 1]].tobytes().decode("utf-8")

    def texts(self, start: int, stop: int) -> list[str]:
        """Passages start … stop-1."""
        return [self.text(row) for row in range(start, stop)]


class HashSet:
    """Which of many int64 hashes were seen before: sorted runs, merged like the digits of a counter.

    8 bytes a hash, where a set of Python ints takes 70. Each hash is sorted again log2(n / block) times.
    """

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """bool of each hash: it is new, and the first of its kind among these. All are remembered."""
        distinct, first = np.unique(hashes, return_index=True)
        known = np.zeros(len(distinct), dtype=bool)
        for run in self._runs:
            place = np.searchsorted(run, distinct).clip(max=len(run) - 1)
            known |= run[place] == distinct
        fresh = np.zeros(len(hashes), dtype=bool)
        fresh[first[~known]] = True
        self._push(distinct[~known])
        return fresh

    def _push(self, run: np.ndarray) -> None:
        if not len(run):
            return
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # two sorted runs: a merge
        self._runs.append(run)


class _Writer:
    """Appends blocks of texts to the files of a pool."""

    def __init__(self, texts: IO[bytes], keep_empty: bool):
        self.texts, self.keep_empty = texts, keep_empty
        self.starts, self.hashes = array("q", [0]), array("q")
        self.num_duplicates = self.num_empty = 0
        self._seen = HashSet()
        self._block: list[str] = []

    def add(self, text: str) -> None:
        if not text.strip():
            self.num_empty += 1
            if not self.keep_empty:
                return
        self._block.append(text)
        if len(self._block) == _BLOCK_TEXTS:
            self.flush()

    def flush(self) -> None:
        hashes = np.array([text_hash(text) for text in self._block], dtype=np.int64)
        fresh = self._seen.add(hashes)
        for text in (text for text, is_new in zip(self._block, fresh) if is_new):
            self.starts.append(self.starts[-1] + self.texts.write(text.encode("utf-8")))
        self.hashes.frombytes(hashes[fresh].tobytes())
        self.num_duplicates += int((~fresh).sum())
        self._block = []


def write_pool(texts: Iterable[str], folder: Path, keep_empty: bool = False) -> TextPool:
    """Write the distinct texts into a new pool; the folder appears when it is complete.

    Args:
        keep_empty: an empty text is a passage as any other.

    Raises:
        DataError: no text at all.
    """
    with atomic_folder(folder) as aside:
        with open(aside / "texts.bin", "wb") as stream:
            writer = _Writer(stream, keep_empty)
            for text in texts:
                writer.add(text)
            writer.flush()
        if writer.starts[-1] == 0:
            rule = f"holds no passage ({writer.num_empty} empty texts)"
            raise DataError("corpus", None, rule, "give files with at least one text")
        np.save(aside / "starts.npy", np.frombuffer(writer.starts, dtype=np.int64))
        hashes = np.frombuffer(writer.hashes, dtype=np.int64)
        np.save(aside / "hashes.npy", hashes)
        counts = {"num_duplicates": writer.num_duplicates, "num_empty": writer.num_empty}
        fingerprint = hashlib.blake2b(hashes.tobytes(), digest_size=16).hexdigest()
        write_json(aside / "pool.json", {"fingerprint": fingerprint, "num_passages": len(hashes), **counts})
    return open_pool(folder)


def open_pool(folder: Path) -> TextPool:
    """Map a finished pool.

    Raises:
        DataError: not there, or damaged.
    """
    try:
        about = read_json(folder / "pool.json")
        starts, hashes = (np.load(folder / name, mmap_mode="r") for name in ("starts.npy", "hashes.npy"))
        blob = np.memmap(folder / "texts.bin", dtype=np.uint8, mode="r")
        if len(starts) != len(hashes) + 1 or starts[-1] != len(blob):
            raise ValueError("its files do not belong together")
    except (OSError, EOFError, ValueError) as error:
        rule = f"holds no readable pool of passages ({error})"
        raise DataError("pool", str(folder), rule, "remove the folder and start again") from error
    return TextPool(
        folder=folder,
        fingerprint=about["fingerprint"],
        num_duplicates=about["num_duplicates"],
        num_empty=about["num_empty"],
        starts=starts,
        hashes=hashes,
        blob=blob,
    )
