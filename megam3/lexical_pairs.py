"""The distinct ordinary ids of each text of a stream, found on the host: what the lexical head writes into.

    texts  <s> a b a </s> | <s> c </s>        ids     a b | c
                                              counts  2, 1
                                              pair_T  0 1 2 1 0 0 3 0

`pair_T` is 1 + the place of the token's id among all pairs, and 0 for special tokens. A run of texts is cut
out by subtracting the number of pairs before it and clamping at 0, so a chunk needs nothing but its own view.

Found here and not on the device, because their number decides the shape of everything behind it: a device
would have to be waited for. Free of torch, for the loader's workers (one second of start-up, not three).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class PairArrays(NamedTuple):
    """Z (text, id) pairs of N texts, ascending by text, then id."""

    ids: np.ndarray
    """int64 [Z]."""
    counts: np.ndarray
    """int64 [N]: pairs of each text."""
    pair_of_token: np.ndarray
    """int64 [T]: 1 + pair of each token, 0 for special tokens."""


def find_pairs(
    tokens: np.ndarray, lengths: Sequence[int] | np.ndarray, special_ids: Sequence[int]
) -> PairArrays:
    """The pairs of texts that lie one after the other in `tokens`; ids below 2**31."""
    lengths = np.asarray(lengths, dtype=np.int64)
    text_of_token = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    kept = ~np.isin(tokens, np.asarray(special_ids, dtype=np.int64))
    # one sortable key a token: text and id share an int64
    keys, pair_of_kept = np.unique(
        (text_of_token[kept] << 31) | tokens[kept].astype(np.int64), return_inverse=True
    )
    pair_of_token = np.zeros(len(tokens), dtype=np.int64)
    pair_of_token[kept] = pair_of_kept.reshape(-1) + 1
    return PairArrays(keys & 0x7FFFFFFF, np.bincount(keys >> 31, minlength=len(lengths)), pair_of_token)
