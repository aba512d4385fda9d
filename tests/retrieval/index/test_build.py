"""Encoding a pool into shards: equal to the embedder's own output, resumable, refused when something else
changed."""

import shutil

import numpy as np
import pytest
import torch

from megam3.embedder import M3Embedder
from megam3.errors import CheckpointError, ConfigError, DataError
from megam3.retrieval.index import build
from megam3.retrieval.index.build import EncodeOptions, build_index, model_fingerprint, passages_per_shard
from megam3.retrieval.index.layout import PassageIndex, shard_folder
from megam3.retrieval.index.pool import write_pool
from tests.factory import make_sentences, make_tiny_model_folder

TEXTS = [*make_sentences(25, seed=1), "x", *make_sentences(4, seed=2, min_words=20, max_words=60)]
OPTIONS = EncodeOptions(max_tokens=40, batch_tokens=120, dense_dtype="float32", multi_vector=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model_folder(tmp_path_factory.mktemp("model"), max_tokens=64)


@pytest.fixture(scope="module")
def embedder(folder):
    return M3Embedder(folder, device="cpu")


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "MAX_SHARD_PASSAGES", 8)
    return write_pool(TEXTS, tmp_path / "pool")


def test_shards_hold_what_the_embedder_gives(tmp_path, embedder, pool):
    index = build_index(embedder, pool, tmp_path / "index", "m", OPTIONS)
    wanted = embedder.encode(TEXTS, max_tokens=40)
    assert (len(index), index.spec.num_shards) == (30, 4)
    got = index.gather(range(30))
    np.testing.assert_allclose(got.dense_ND, wanted.dense_vecs, atol=1e-5)
    for n in range(30):
        ids, weights = got.lexical(n)
        assert sorted(ids) == list(ids)
        lexical = {str(i): w for i, w in zip(ids.tolist(), weights.tolist())}
        assert lexical == pytest.approx(wanted.lexical_weights[n], rel=1e-3)
        np.testing.assert_allclose(got.multi(n), wanted.colbert_vecs[n], atol=1e-3)


def test_the_inverted_form_holds_the_same_pairs(tmp_path, embedder, pool):
    index = build_index(embedder, pool, tmp_path / "index", "m", OPTIONS)
    for number in range(4):
        shard = index.shard(number)
        postings = shard.postings
        inverted = {
            (int(postings.terms_U[u]), int(postings.rows_Z[z])): float(postings.weights_Z[z])
            for u in range(len(postings.terms_U))
            for z in range(postings.offsets_U1[u], postings.offsets_U1[u + 1])
        }
        straight = {
            (int(i), n): float(w)
            for n in range(shard.vectors.num_texts)
            for i, w in zip(*shard.vectors.lexical(n))
        }
        assert inverted == straight


def test_only_missing_shards_are_encoded(tmp_path, embedder, pool, monkeypatch):
    whole = build_index(embedder, pool, tmp_path / "index", "m", OPTIONS).gather(range(30))
    shutil.rmtree(shard_folder(tmp_path / "index", 2))
    with pytest.raises(
        DataError, match="1 of 4 shards are missing, the first is 2; start its building again"
    ):
        PassageIndex(tmp_path / "index")
    encoded = []
    original = build.encode_vectors
    monkeypatch.setattr(
        build,
        "encode_vectors",
        lambda e, texts, **options: encoded.append(len(texts)) or original(e, texts, **options),
    )
    seen = []
    again = build_index(embedder, pool, tmp_path / "index", "m", OPTIONS, lambda *done: seen.append(done))
    assert encoded == [8]
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    np.testing.assert_array_equal(again.gather(range(30)).dense_ND, whole.dense_ND)


def test_an_interrupted_shard_leaves_no_folder(tmp_path, embedder, pool, monkeypatch):
    def killed(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        build_index(embedder, pool, tmp_path / "index", "m", OPTIONS)
    assert list((tmp_path / "index" / "shards").iterdir()) == []


def test_another_model_limit_or_pool_needs_another_index(tmp_path, embedder, pool):
    build_index(embedder, pool, tmp_path / "index", "m", OPTIONS)
    with pytest.raises(
        DataError, match="its shards were made with model 'm', now it is 'other'; remove the folder"
    ):
        build_index(embedder, pool, tmp_path / "index", "other", OPTIONS)
    with pytest.raises(DataError, match="made with max_tokens 40, now it is 30"):
        build_index(
            embedder, pool, tmp_path / "index", "m", EncodeOptions(max_tokens=30, dense_dtype="float32")
        )
    with pytest.raises(ConfigError, match="dense_dtype = 'int8': must be float16 or float32"):
        build_index(embedder, pool, tmp_path / "index", "m", EncodeOptions(dense_dtype="int8"))
    (tmp_path / "index" / "spec.json").write_text("{")
    with pytest.raises(DataError, match="its spec.json cannot be read"):
        PassageIndex(tmp_path / "index")


def test_broken_weights_are_refused(tmp_path, folder, pool):
    broken = M3Embedder(folder, device="cpu")
    with torch.no_grad():
        broken.model.lexical_head.bias.fill_(torch.inf)
    with pytest.raises(CheckpointError, match="give representations that are not finite"):
        build_index(broken, pool, tmp_path / "index", "m", OPTIONS)
    with torch.no_grad():
        broken.model.lexical_head.bias.fill_(1e6)
    with pytest.raises(DataError, match="lexical weight = .*: is above 65504"):
        build_index(broken, pool, tmp_path / "index", "m", OPTIONS)


def test_a_damaged_shard_is_named(tmp_path, embedder, pool):
    build_index(embedder, pool, tmp_path / "index", "m", OPTIONS)
    (shard_folder(tmp_path / "index", 1) / "dense.npy").write_bytes(b"")
    with pytest.raises(DataError, match="index shard = '.*00001': cannot be read .*; remove it and build"):
        PassageIndex(tmp_path / "index").shard(1)


def test_an_empty_folder_is_no_index(tmp_path):
    with pytest.raises(DataError, match="holds no index; build it first"):
        PassageIndex(tmp_path)


def test_the_fingerprint_follows_the_weights(tmp_path, folder):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert model_fingerprint(copy) == model_fingerprint(folder)
    (copy / "sparse_linear.pt").write_bytes((copy / "sparse_linear.pt").read_bytes() + b" ")
    assert model_fingerprint(copy) != model_fingerprint(folder)


def test_shards_are_smaller_where_texts_are_long(tmp_path, monkeypatch):
    pool = write_pool(["a" * 1000, "b" * 3000], tmp_path / "pool")
    monkeypatch.setattr(build, "MAX_SHARD_TEXT_BYTES", 100_000)
    assert passages_per_shard(pool) == 50
