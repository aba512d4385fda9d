"""Search over shards against every score computed pair by pair."""

import numpy as np
import pytest
import torch

from megam3.config.weights import HeadWeights
from megam3.errors import ConfigError
from megam3.retrieval.index.layout import invert
from megam3.retrieval.index.nearest import DENSE_SEARCHES, build_approximate, dense_hits
from megam3.retrieval.index.search import (
    SearchOptions,
    find_candidates,
    lexical_hits,
    posting_hits,
    score_passages,
)
from megam3.retrieval.index.vectors import TextVectors, offsets_of
from megam3.retrieval.topk import NO_ROW
from tests.retrieval.index.made_up import VOCAB, make_index, make_vectors, naive_scores

PASSAGES, QUERIES = make_vectors(70, seed=1), make_vectors(9, seed=2)
NAIVE = naive_scores(QUERIES, PASSAGES)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("index"), PASSAGES, per_shard=16)


def check(hits, scores_QP, num_hits, allowed_QP=None):
    """`hits` are the best of `scores_QP`, by descending score."""
    for q, scores in enumerate(scores_QP):
        allowed = np.ones(len(scores), bool) if allowed_QP is None else allowed_QP[q]
        order = [p for p in np.argsort(-scores, kind="stable") if allowed[p]][:num_hits]
        found = [row for row in hits.rows_QK[q].tolist() if row != NO_ROW]
        assert found == order, q
        np.testing.assert_allclose(hits.scores_QK[q, : len(found)], scores[order], atol=1e-5)
        assert torch.isneginf(hits.scores_QK[q, len(found) :]).all()


@pytest.mark.parametrize("how", ["faiss", "torch"])
@pytest.mark.parametrize("num_hits", [1, 5, 16, 40, 200])
def test_dense_hits_are_the_best_of_all(index, how, num_hits):
    check(dense_hits(index, QUERIES.dense_ND, num_hits, how), NAIVE["dense"], num_hits)


@pytest.mark.parametrize("num_hits", [1, 7, 30, 200])
def test_lexical_hits_are_the_best_with_an_id_in_common(index, num_hits):
    check(lexical_hits(index, QUERIES, num_hits), NAIVE["lexical"], num_hits, NAIVE["lexical"] > 0)


def test_multi_vector_ranks_the_best_by_dense_again(index):
    allowed = NAIVE["dense"] >= np.sort(NAIVE["dense"], axis=1)[:, [-20]]
    got = find_candidates(index, QUERIES, SearchOptions(by="multi_vector", depth=20))
    check(got, NAIVE["multi_vector"], 20, allowed)


@pytest.mark.parametrize("multi", [0.7, 0.0])
def test_the_sum_ranks_both_firsts_again(index, multi):
    weights = HeadWeights(dense=0.9, lexical=0.2, multi_vector=multi)
    total = 0.9 * NAIVE["dense"] + 0.2 * NAIVE["lexical"] + multi * NAIVE["multi_vector"]
    depth = 12
    allowed = np.zeros(total.shape, dtype=bool)
    for head in ("dense", "lexical"):
        for q, scores in enumerate(NAIVE[head]):
            allowed[q, np.argsort(-scores, kind="stable")[:depth]] |= head == "dense" or scores.max() > 0
    allowed &= (NAIVE["lexical"] > 0) | (NAIVE["dense"] >= np.sort(NAIVE["dense"], axis=1)[:, [-depth]])
    got = find_candidates(index, QUERIES, SearchOptions(by="sum", depth=depth, weights=weights))
    check(got, total, depth, allowed)


@pytest.mark.parametrize("by", ["dense", "lexical", "multi_vector", "sum"])
def test_scores_of_given_passages(index, by):
    rows = [0, 3, 15, 16, 17, 69]
    options = SearchOptions(by=by, weights=HeadWeights(dense=1.0, lexical=0.3, multi_vector=2.0))
    total = NAIVE["dense"] + 0.3 * NAIVE["lexical"] + 2 * NAIVE["multi_vector"]
    for q in range(QUERIES.num_texts):
        got = score_passages(QUERIES, q, index.gather(rows), options)
        np.testing.assert_allclose(got, (NAIVE | {"sum": total})[by][q, rows], atol=1e-5)


def test_of_equal_scores_at_the_edge_the_first_passages_are_taken():
    """300 passages hold id 7, every fiftieth with twice the weight."""
    weights = np.where(np.arange(300) % 50 == 0, 2, 1).astype(np.float16)
    postings = invert(np.full(300, 7, dtype=np.int32), weights, offsets_of([1] * 300))
    query = TextVectors(
        dense_ND=np.zeros((1, 0), dtype=np.float32),
        lexical_ids_Z=np.array([7], dtype=np.int32),
        lexical_weights_Z=np.ones(1, dtype=np.float32),
        lexical_offsets_N1=offsets_of([1]),
    )
    for num_hits in (3, 6, 20, 300):
        wanted = sorted(range(300), key=lambda row: (-weights[row], row))[:num_hits]
        assert sorted(posting_hits(postings, 300, query, num_hits).rows_QK[0].tolist()) == sorted(wanted)


def test_ids_that_no_passage_holds_find_nothing(index):
    queries = make_vectors(3, seed=5)
    stranger = type(queries)(
        dense_ND=queries.dense_ND,
        lexical_ids_Z=queries.lexical_ids_Z + VOCAB,
        lexical_weights_Z=queries.lexical_weights_Z,
        lexical_offsets_N1=queries.lexical_offsets_N1,
    )
    assert (lexical_hits(index, stranger, 5).rows_QK == NO_ROW).all()


@pytest.mark.parametrize("how", ["ivf", "hnsw"])
def test_approximate_search_finds_nearly_all(tmp_path, how):
    passages = make_vectors(3000, seed=4, multi=False)
    index = make_index(tmp_path, passages, per_shard=1024, dtype="float16")
    with pytest.raises(
        ConfigError, match=f"dense_search = '{how}': needs .*dense.{how}, which was not built"
    ):
        dense_hits(index, QUERIES.dense_ND, 10, how)
    file = build_approximate(index, how)
    written = file.stat().st_mtime_ns
    assert build_approximate(index, how).stat().st_mtime_ns == written
    exact, found = (dense_hits(index, QUERIES.dense_ND, 10, way) for way in ("faiss", how))
    shared = [len(set(a) & set(b)) for a, b in zip(exact.rows_QK.tolist(), found.rows_QK.tolist())]
    assert sum(shared) >= 0.9 * 10 * QUERIES.num_texts
    for q in range(QUERIES.num_texts):
        wanted = passages.dense_ND[found.rows_QK[q].numpy()] @ QUERIES.dense_ND[q]
        np.testing.assert_allclose(found.scores_QK[q], wanted, atol=2e-3)


def test_an_unknown_search_is_refused(index):
    with pytest.raises(ConfigError, match="dense_search = 'scann': must be one of faiss, torch, ivf, hnsw"):
        dense_hits(index, QUERIES.dense_ND, 3, "scann")
    assert set(DENSE_SEARCHES) == {"faiss", "torch", "ivf", "hnsw"}


def test_faiss_on_a_gpu_is_used_where_it_is_there(index, monkeypatch):
    faiss = pytest.importorskip("faiss")
    asked = []

    def knn_gpu(resources, queries, passages, count, metric):
        asked.append((resources, metric))
        return faiss.knn(queries, passages, count, metric=metric)

    monkeypatch.setattr(faiss, "knn_gpu", knn_gpu, raising=False)
    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources", raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    check(dense_hits(index, QUERIES.dense_ND, 5, "faiss"), NAIVE["dense"], 5)
    assert asked == [("resources", faiss.METRIC_INNER_PRODUCT)] * 5
