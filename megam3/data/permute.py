"""Keyed permutations and draws: randomness as a pure function of integers, nothing replayed or stored.

`permute(x, n, key)` maps 0 … n-1 onto itself without ever holding the n numbers: a Feistel network on the
next power of two, walked until it lands below n (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains", method 2). Networks of a few bits are poor ciphers, so small domains are sorted by hash instead,
which costs at most SMALL entries.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

SMALL = 4096
ROUNDS = 6
"""Four give a pseudo-random permutation if the round function is one
(Luby and Rackoff 1988); ours only mixes well."""
_MASK = (1 << 64) - 1


def key_of(*parts: int | str) -> int:
    """64-bit key of any integers and strings; the same on every machine and Python."""
    text = "\x1f".join(f"{type(part).__name__[0]}{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(values: np.ndarray) -> np.ndarray:
    """Scramble uint64 values one by one (the finaliser of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def draw(key: int, *columns: np.ndarray) -> np.ndarray:
    """A uint64 draw for each row of the integer columns, e.g. (row, pass, slot)."""
    state = np.full(
        np.broadcast_shapes(*(np.shape(column) for column in columns)), key & _MASK, dtype=np.uint64
    )
    for column in columns:
        state = mix(
            state + np.asarray(column).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
        )
    return state


def permute(positions: np.ndarray, size: int, key: int) -> np.ndarray:
    """Where each of `positions` (int64, below `size`) goes under permutation `key` of 0 … size-1."""
    if size <= SMALL:
        return _small(size, key)[positions]
    bits = (size - 1).bit_length()
    low_bits, high_bits = bits // 2, bits - bits // 2
    values = _feistel(positions.astype(np.uint64), low_bits, high_bits, key)
    outside = np.flatnonzero(values >= size)
    while len(outside):
        values[outside] = _feistel(values[outside], low_bits, high_bits, key)
        outside = outside[values[outside] >= size]
    return values.astype(np.int64)


@lru_cache(maxsize=4096)
def _small(size: int, key: int) -> np.ndarray:
    return np.argsort(draw(key, np.arange(size)), kind="stable")


def _feistel(values: np.ndarray, low_bits: int, high_bits: int, key: int) -> np.ndarray:
    """A bijection of 0 … 2**(low_bits + high_bits) - 1: each half is xored with a hash of the other."""
    low_mask, high_mask, shift = (
        np.uint64((1 << low_bits) - 1),
        np.uint64((1 << high_bits) - 1),
        np.uint64(low_bits),
    )
    low, high = values & low_mask, values >> shift
    for number in range(0, ROUNDS, 2):
        high = high ^ (_round(low, key, number) & high_mask)
        low = low ^ (_round(high, key, number + 1) & low_mask)
    return (high << shift) | low


def _round(half: np.ndarray, key: int, number: int) -> np.ndarray:
    mixed = (half + np.uint64((key + number * 0x9E3779B97F4A7C15) & _MASK)) * np.uint64(0xFF51AFD7ED558CCD)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xC4CEB9FE1A85EC53)
    return mixed >> np.uint64(29)
