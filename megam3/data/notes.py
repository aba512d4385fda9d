"""What a user should know of the prepared data before the first step: cut texts, keys that are not read, how
many passages a query has, whether there are scores. From the manifests alone, so free of cost at any size.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import NamedTuple

from megam3.data.manifest import Manifest
from megam3.data.record import PAIR_KEYS, TEXT_KEYS

NEAR = 0.5
"""Least similarity (difflib's ratio) to the known key that may be meant: `negatives` has 0.5 with `neg`."""
MAX_KEYS_SHOWN = 5


class Note(NamedTuple):
    """One line for the log."""

    is_warning: bool
    text: str


def data_notes(manifest: Manifest) -> Iterator[Note]:
    """Lines on one dataset, each beginning with its name."""
    totals = manifest.totals
    if manifest.kind == "pair":
        passages = (totals.texts - totals.rows) / totals.rows
        scored = 100.0 * totals.with_scores / totals.rows
        means = f"{passages:.2f} passages per query on average, teacher scores in {scored:.0f} %"
        yield Note(False, f"{manifest.name}: {totals.rows} records, {means}")
        if totals.texts == 2 * totals.rows:
            alone = "each query has one passage and no negative of its own; it learns from the batch's others"
            yield Note(True, f"{manifest.name}: {alone} alone")
    by_count = sorted(totals.unknown_keys.items(), key=lambda item: (-item[1], item[0]))
    for key, count in by_count[:MAX_KEYS_SHOWN]:
        near = difflib.get_close_matches(key, PAIR_KEYS if manifest.kind == "pair" else TEXT_KEYS, 1, NEAR)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        held = f"{count} of {totals.rows} records hold the key {key!r}, which is not read{hint}"
        yield Note(True, f"{manifest.name}: {held}")
    if len(by_count) > MAX_KEYS_SHOWN:
        rest = ", ".join(repr(key) for key, _ in by_count[MAX_KEYS_SHOWN:])
        yield Note(True, f"{manifest.name}: neither are these keys read: {rest}")
    if totals.truncated:
        text = f"{totals.truncated} of {totals.texts} texts were longer than their limit and are cut"
        yield Note(True, f"{manifest.name}: {text}")
