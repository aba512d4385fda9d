"""Every mode's ranking against brute force in numpy, over an encoder whose numbers are known."""

import json
import math

import numpy as np
import pytest
import torch

from megam3.config.schema import EvaluationConfig
from megam3.config.weights import HeadWeights
from megam3.errors import CheckpointError, ConfigError
from megam3.retrieval import evaluate as evaluation
from megam3.retrieval.beir import BeirDataset
from megam3.retrieval.bm25 import bm25_hits, find_framing
from megam3.retrieval.encode import encode_texts
from megam3.retrieval.evaluate import MODES, evaluate, length_bucket
from megam3.retrieval.results import group_table, overall_table, read_result
from megam3.retrieval.search import maxsim_of
from megam3.retrieval.topk import NO_ROW
from tests.retrieval.toys import encode_ids, text_tables, tokenize, toy_dataset

CONFIG = EvaluationConfig(
    rerank_dense=12,
    rerank_hybrid=10,
    batch_tokens=100,
    weights=HeadWeights(dense=1, lexical=0.3, multi_vector=1),
)


def all_scores(dataset):
    """dense, lexical, multi [Q, P], pair by pair."""
    queries = [text_tables(ids) for ids in tokenize(dataset.queries, 512)]
    passages = [text_tables(ids) for ids in tokenize(dataset.passages, 8192)]
    dense = np.array([[q[0] @ p[0] for p in passages] for q in queries])
    lexical = np.array(
        [[sum(w * p[1].get(i, 0.0) for i, w in q[1].items()) for p in passages] for q in queries]
    )
    multi = np.array(
        [[np.mean([max(row @ other for other in p[2]) for row in q[2]]) for p in passages] for q in queries]
    )
    return dense, lexical, multi


def best(scores, allowed, count):
    return sorted(allowed, key=lambda row: (-scores[row], row))[:count]


def brute_force(dataset, config):
    dense, lexical, multi = all_scores(dataset)
    weights = config.weights
    rankings = {mode: [] for mode in MODES[:5]}
    for d, s, m in zip(dense, lexical, multi):
        everything = range(len(d))
        by_dense, by_lexical = (
            best(d, everything, len(d)),
            best(s, [row for row in everything if s[row] > 0], len(d)),
        )
        union = set(by_dense[: config.rerank_hybrid]) | set(by_lexical[: config.rerank_hybrid])
        two = weights.dense * d + weights.lexical * s
        rankings["Dense"].append(by_dense)
        rankings["Sparse"].append(by_lexical)
        rankings["Multi-vec"].append(best(m, by_dense[: config.rerank_dense], 100))
        rankings["Dense+Sparse"].append(best(two, union, 100))
        rankings["All"].append(best(two + weights.multi_vector * m, union, 100))
    return rankings


def found(dataset, config, modes=MODES):
    texts = evaluation._Tokenised(tokenize(dataset.queries, 512), tokenize(dataset.passages, 8192))
    hits = evaluation._search(texts, encode_ids, config, modes)
    return {
        mode: [[row for row in rows if row != NO_ROW] for rows in value.rows_QK.tolist()]
        for mode, value in hits.items()
    }


@pytest.mark.parametrize(("rerank_dense", "rerank_hybrid"), [(12, 10), (5, 20), (200, 1000)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_ranking_equals_brute_force(seed, rerank_dense, rerank_hybrid, monkeypatch):
    monkeypatch.setattr(
        evaluation, "encode_texts", lambda *args, **kwargs: encode_texts(*args[:3], torch.float32)
    )
    dataset = toy_dataset(seed=seed)
    config = CONFIG.model_copy(update={"rerank_dense": rerank_dense, "rerank_hybrid": rerank_hybrid})
    rankings, expected = found(dataset, config), brute_force(dataset, config)
    for mode in MODES[:5]:
        for ours, theirs in zip(rankings[mode], expected[mode]):
            assert ours[:100] == theirs[: len(ours[:100])], mode
            assert len(ours) >= min(len(theirs), 100), mode


def test_multi_vectors_encoded_again_give_the_same_ranking(monkeypatch):
    dataset = toy_dataset()
    kept = found(dataset, CONFIG)
    monkeypatch.setattr(
        evaluation,
        "encode_texts",
        lambda *args, multi_bytes=0, **kwargs: encode_texts(*args, multi_bytes=multi_bytes),
    )
    assert found(dataset, CONFIG) == kept


def test_small_chunks_and_batches_change_nothing(monkeypatch):
    dataset = toy_dataset()
    expected = found(dataset, CONFIG)
    for name in ("dense_blocks", "lexical_blocks"):
        blocks = getattr(evaluation, name)
        monkeypatch.setattr(evaluation, name, lambda q, p, blocks=blocks: blocks(q, p, 7 * q.num_texts))
    assert found(dataset, CONFIG.model_copy(update={"batch_tokens": 1})) == expected


def test_texts_come_back_in_order_and_fp16_is_close():
    ids = tokenize(toy_dataset().passages, 8192)
    encoded = encode_texts(encode_ids, ids, batch_tokens=64)
    for number, text in enumerate(ids):
        dense, weights, rows = text_tables(text)
        pairs = slice(*encoded.lexical_offsets_N1[number : number + 2].tolist())
        np.testing.assert_allclose(encoded.dense_ND[number], dense, rtol=1e-6, atol=1e-7)
        assert encoded.lexical_ids_Z[pairs].tolist() == list(weights)
        np.testing.assert_allclose(encoded.lexical_weights_Z[pairs], list(weights.values()), rtol=1e-6)
        np.testing.assert_allclose(encoded.multi_rows[number].numpy(), rows, atol=2**-11)


def test_chunked_maxsim_equals_the_loop():
    generator = np.random.default_rng(5)
    queries = [torch.tensor(generator.normal(size=(n, 6)), dtype=torch.float32) for n in (3, 1, 7, 2)]
    passage = torch.tensor(generator.normal(size=(5, 6)), dtype=torch.float32)
    expected = [np.mean([max(float(row @ other) for other in passage) for row in rows]) for rows in queries]
    for chunk in (1, 40, 1 << 20):
        assert maxsim_of(queries, passage, chunk).tolist() == pytest.approx(expected, rel=1e-5)


def test_non_finite_weights_are_an_error():
    def broken(ids):
        encoded = encode_ids(ids)
        encoded.dense_ND[0, 0] = math.nan
        return encoded

    with pytest.raises(
        CheckpointError, match="representations that are not finite; evaluate an earlier checkpoint"
    ):
        encode_texts(broken, [[0, 5, 2]], 100)


@pytest.mark.parametrize("on_top", [0, 1])
def test_a_query_that_is_a_passage_does_not_find_itself(on_top):
    """As ArguAna: query d3 is passage d3; d5, which begins alike, is the relevant one."""
    own, others = toy_dataset().passages, ["30 31 32 33"] * 120
    dataset = BeirDataset(
        name="arguana",
        passage_ids=[f"d{n}" for n in range(len(own) + len(others))],
        passages=[*own, *others],
        query_ids=["d3", "d71"],
        queries=[own[3], others[1]],
        languages=["und", "und"],
        qrels={"d3": {f"d{3 + on_top}": 1}, "d71": {"d170": 1}},
    )
    if on_top:
        dataset.passages[4] = f"{own[3]} 39"
    result = evaluate(dataset, tokenize, encode_ids, CONFIG, ["BM25"]).modes["BM25"]
    # of the 119 equal passages besides itself d170 is the 100th: one hundred are left when it is out
    assert result.overall == {"ndcg@10": 0.5, "recall@100": 1.0, "mrr@10": 0.5}


@pytest.mark.parametrize(("before", "after"), [((0,), (2,)), ((), (2,)), ((0,), ()), ((), ())])
def test_bm25_leaves_out_no_word_where_a_tokenizer_puts_fewer_special_tokens(before, after):
    def framed(texts, max_tokens):
        return [[*before, *map(int, text.split()), *after] for text in texts]

    dataset = toy_dataset()
    wanted = evaluate(dataset, tokenize, encode_ids, CONFIG, ["BM25"])
    found = evaluate(dataset, framed, encode_ids, CONFIG, ["BM25"])
    assert find_framing(framed, 512) == (len(before), len(after))
    assert found.modes == wanted.modes


def test_bm25_equals_its_formula():
    dataset = toy_dataset(num_passages=30)
    queries, passages = tokenize(dataset.queries, 512), tokenize(dataset.passages, 8192)
    hits = bm25_hits(queries, passages, 30)
    documents = [ids[1:-1] for ids in passages]
    mean_length = np.mean([len(d) for d in documents])
    for query, scores, rows in zip(queries, hits.scores_QK.tolist(), hits.rows_QK.tolist()):
        expected = np.zeros(30)
        for token in query[1:-1]:
            frequency = sum(token in d for d in documents)
            idf = math.log(1 + (30 - frequency + 0.5) / (frequency + 0.5))
            for row, d in enumerate(documents):
                count = d.count(token)
                expected[row] += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(d) / mean_length))
        for score, row in zip(scores, rows):
            assert score == pytest.approx(expected[row], rel=1e-4) if row != NO_ROW else score == -np.inf
        assert sum(row != NO_ROW for row in rows) == (expected > 0).sum()


def test_result_has_groups_and_survives_json(tmp_path):
    dataset = toy_dataset()
    result = evaluate(dataset, tokenize, encode_ids, CONFIG)
    assert tuple(result.modes) == MODES
    assert (result.num_queries, result.num_passages) == (9, 70)
    dense = result.modes["Dense"]
    assert list(dense.by_language) == ["de", "en", "fi"]
    weighted = sum(group["queries"] * group["ndcg@10"] for group in dense.by_language.values()) / 9
    assert weighted == pytest.approx(dense.overall["ndcg@10"])
    assert sum(group["queries"] for group in dense.by_length.values()) == 9
    result.write(tmp_path / "eval" / "toy.json")
    assert read_result(tmp_path / "eval" / "toy.json") == result
    assert json.loads((tmp_path / "eval" / "toy.json").read_text())["dataset"] == "toy"
    assert result.scalars()["eval/toy/All/ndcg@10"] == result.modes["All"].overall["ndcg@10"]
    assert overall_table([result, result]).row_count == 6
    assert group_table(result, "language").row_count == 3


def test_only_the_asked_modes_are_measured_and_truncation_is_counted():
    dataset = toy_dataset()
    config = CONFIG.model_copy(update={"passage_max_tokens": 10})
    result = evaluate(dataset, tokenize, encode_ids, config, ["BM25", "Dense"])
    assert list(result.modes) == ["Dense", "BM25"]
    assert result.num_at_limit > 10
    with pytest.raises(ConfigError, match="modes = 'dense': must be among Dense, Sparse"):
        evaluate(dataset, tokenize, encode_ids, CONFIG, ["dense"])


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(1, "1-128"), (128, "1-128"), (129, "129-256"), (8192, "4097-8192"), (8193, "over 8192")],
)
def test_length_buckets(tokens, name):
    assert length_bucket(tokens) == name
