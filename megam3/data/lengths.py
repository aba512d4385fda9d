"""How long the texts of a prepared store are: what the memory plan asks of the data. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megam3.data.store import dataset_folder

MAX_ROWS_READ = 10_000_000
"""Rows whose queries are looked at, 8 bytes each; in a larger store the longest text bounds them."""


@dataclass(frozen=True, kw_only=True)
class LongestTexts:
    """Over all datasets of a recipe, in tokens, special tokens included."""

    query_tokens: int
    """Of the longest query; of the longest text where the store is too large to look."""
    text_tokens: int
    """Of the longest query or passage."""


def longest_texts(store_dir: str | Path, names: Sequence[str]) -> LongestTexts | None:
    """What the finished datasets `names` hold at most; None where one is not there, or cannot be read (who
    opens it says why)."""
    queries, texts = [], []
    for name in names:
        folder = dataset_folder(store_dir, name)
        if not (folder / "manifest.json").is_file():
            return None
        try:
            runs, index = (np.load(folder / file, mmap_mode="r") for file in ("runs.npy", "index.npy"))
            texts.append(int(runs["longest"].max(initial=0)))
            is_small = len(index) <= MAX_ROWS_READ
            queries.append(int(index["query_tokens"].max(initial=0)) if is_small else texts[-1])
        except (OSError, ValueError):
            return None
    return LongestTexts(query_tokens=max(queries), text_tokens=max(texts)) if texts else None
