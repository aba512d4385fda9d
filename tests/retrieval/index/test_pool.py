"""The pool of texts: what goes in comes out, once, in order."""

import numpy as np
import pytest

from megam3.data.shard import text_hash
from megam3.errors import DataError
from megam3.retrieval.index.pool import HashSet, open_pool, write_pool


def test_texts_come_back_in_the_order_of_their_first_place(tmp_path):
    pool = write_pool(["b ü", "a", "", "b ü", "  ", "c\n2", "a"], tmp_path / "pool")
    assert pool.texts(0, len(pool)) == ["b ü", "a", "c\n2"]
    assert (pool.num_duplicates, pool.num_empty, pool.num_bytes) == (2, 2, 8)
    assert pool.hashes.tolist() == [text_hash(text) for text in ("b ü", "a", "c\n2")]
    again = open_pool(tmp_path / "pool")
    assert again.texts(1, 3) == ["a", "c\n2"]
    assert again.fingerprint == pool.fingerprint
    assert write_pool(["a", "b ü", "c\n2"], tmp_path / "other").fingerprint != pool.fingerprint


def test_duplicates_are_found_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("megam3.retrieval.index.pool._BLOCK_TEXTS", 7)
    texts = [f"text {n % 50}" for n in range(331)]
    pool = write_pool(iter(texts), tmp_path / "pool")
    assert pool.texts(0, len(pool)) == list(dict.fromkeys(texts))
    assert pool.num_duplicates == 331 - 50


def test_a_hash_set_is_a_set():
    rng = np.random.default_rng(0)
    ours, reference = HashSet(), set()
    for size in (1, 5, 100, 3, 0, 1000, 40):
        hashes = rng.integers(-300, 300, size=size)
        got = ours.add(hashes)
        for value, is_new in zip(hashes.tolist(), got.tolist()):
            assert is_new == (value not in reference)
            reference.add(value)


def test_no_text_at_all_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"corpus = None: holds no passage \(2 empty texts\)"):
        write_pool(["", " "], tmp_path / "pool")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_pool_is_refused(tmp_path):
    write_pool(["a", "b"], tmp_path / "pool")
    (tmp_path / "pool" / "texts.bin").write_bytes(b"a")
    with pytest.raises(DataError, match="holds no readable pool of passages .*; remove the folder and start"):
        open_pool(tmp_path / "pool")
    with pytest.raises(DataError, match="holds no readable pool"):
        open_pool(tmp_path / "nowhere")
