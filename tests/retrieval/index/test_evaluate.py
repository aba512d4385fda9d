"""Evaluation over files equals evaluation in memory: six modes, documents with one text, empty ones, queries
without judgements, answers instead of judgements."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import megam3.retrieval.index.bm25 as bm25_module
import megam3.retrieval.index.build as build_module
import megam3.retrieval.index.modes as modes_module
import megam3.retrieval.index.search as search_module
from megam3.config.schema import EvaluationConfig
from megam3.config.weights import HeadWeights
from megam3.errors import ConfigError, DataError
from megam3.packed_texts import length_batches
from megam3.retrieval.beir import read_beir
from megam3.retrieval.bm25 import bm25_hits
from megam3.retrieval.evaluate import MODES, evaluate
from megam3.retrieval.index.bm25 import CountsSpec, bm25_on_disk, count_tokens
from megam3.retrieval.index.documents import open_documents, write_documents
from megam3.retrieval.index.evaluate import count_passages, evaluate_on_disk, open_test_set
from megam3.retrieval.topk import NO_ROW, Hits, sort_by_score
from tests.retrieval.toys import HIDDEN, VOCAB, WIDTH, encode_ids, tokenize

CONFIG = EvaluationConfig(
    rerank_dense=12,
    rerank_hybrid=10,
    batch_tokens=100,
    weights=HeadWeights(dense=1, lexical=0.3, multi_vector=1),
)


def _in_float16(representations):
    """Lexical weights and multi-vector rows as an index stores them, so that nothing is left to rounding."""
    return type(representations)(
        **{
            **vars(representations),
            "lexical_weights_Z": representations.lexical_weights_Z.half().float(),
            "multi_KC": representations.multi_KC.half().float(),
        }
    )


def encode_halved(token_ids):
    return _in_float16(encode_ids(token_ids))


class ToyEmbedder:
    """What an index asks of an M3Embedder, over the table of tests/retrieval/toys.py."""

    max_tokens, device = 8192, torch.device("cpu")
    model = SimpleNamespace(
        encoder=SimpleNamespace(config=SimpleNamespace(hidden_size=HIDDEN)),
        multi_vector_head=SimpleNamespace(out_features=WIDTH),
        first_id=0,
    )
    heads = ("dense", "lexical", "multi_vector")

    def token_arrays(self, texts, *, max_tokens):
        return [np.array(ids, dtype=np.int32) for ids in tokenize(texts, max_tokens)]

    def represent_ids(self, token_ids, *, batch_tokens, heads=None):
        for indices in length_batches([len(ids) for ids in token_ids], batch_tokens):
            yield indices, encode_halved([token_ids[i].tolist() for i in indices])


def write_test_set(folder: Path, *, seed: int, answers: bool = False) -> Path:
    """70 documents: 40 texts of their own, 25 that others have as well, 5 empty ones, in mixed order."""
    generator = np.random.default_rng(seed)

    def text(low, high):
        return " ".join(map(str, generator.integers(4, VOCAB, size=generator.integers(low, high))))

    texts = [text(3, 30) for _ in range(40)]
    texts += [texts[n] for n in generator.integers(0, 9, size=25)] + [""] * 5
    texts = [texts[n] for n in generator.permutation(len(texts))]
    (folder / "qrels").mkdir(parents=True)
    records = [{"_id": f"d{n}", "text": value} for n, value in enumerate(texts)]
    # a text with the words of a title and the rest under `text` is the same passage
    records[3] = {"_id": "d3", "title": texts[3].split(" ")[0], "text": " ".join(texts[3].split(" ")[1:])}
    (folder / "corpus.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    queries = [{"_id": f"q{n}", "text": text(1, 6), "lang": ("en", "de")[n % 2]} for n in range(11)]
    if answers:
        for query in queries[:9]:
            query["answers"] = [text(1, 2)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    # q9 is judged irrelevant only, q10 not at all: neither is measured
    judged = {(f"q{n % 9}", f"d{generator.integers(70)}"): 1 + n % 2 for n in range(27)}
    lines = [] if answers else [f"{q}\t{d}\t{grade}\n" for (q, d), grade in judged.items()]
    (folder / "qrels" / "test.tsv").write_text("".join([*lines, *([] if answers else ["q9\td1\t0\n"])]))
    return folder


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(build_module, "MAX_SHARD_PASSAGES", 16)
    monkeypatch.setattr(bm25_module, "SHARD_PASSAGES", 16)


@pytest.mark.parametrize("answers", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_results_on_disk_are_those_in_memory(tmp_path, small_shards, seed, answers):
    folder = write_test_set(tmp_path / "toy", seed=seed, answers=answers)
    in_memory = evaluate(read_beir(folder), tokenize, encode_halved, CONFIG)
    opened = open_test_set(folder, "test", tmp_path / "index")
    assert len(opened.documents) == 70
    assert len(opened.documents.pool) <= 41
    on_disk = evaluate_on_disk(opened, ToyEmbedder(), "toy", CONFIG)
    assert on_disk.num_queries == 9
    assert list(on_disk.modes) == list(MODES)
    for mode in MODES:
        # every figure over all queries, of every language and of every bucket of lengths
        assert on_disk.modes[mode] == in_memory.modes[mode], mode
    for name in ("dataset", "num_queries", "num_passages", "num_tokens", "num_at_limit"):
        assert getattr(on_disk, name) == getattr(in_memory, name), name
    assert any(figures.overall["ndcg@10"] > 0 for figures in on_disk.modes.values())


def test_small_slices_products_and_limits_change_nothing(tmp_path, small_shards, monkeypatch):
    config = CONFIG.model_copy(update={"passage_max_tokens": 9, "query_max_tokens": 4})
    folder = write_test_set(tmp_path / "toy", seed=3)
    in_memory = evaluate(read_beir(folder), tokenize, encode_halved, config)
    assert in_memory.num_at_limit > 20
    monkeypatch.setattr(modes_module, "GATHERED_BYTES", 1)  # a passage at a time
    monkeypatch.setattr(search_module, "PRODUCT_ENTRIES", 40)  # two queries at a time
    opened = open_test_set(folder, "test", tmp_path / "index")
    on_disk = evaluate_on_disk(opened, ToyEmbedder(), "toy", config)
    assert (on_disk.modes, on_disk.num_at_limit) == (in_memory.modes, in_memory.num_at_limit)


def test_only_the_asked_modes_are_searched_and_a_second_run_encodes_nothing(tmp_path, monkeypatch):
    opened = open_test_set(write_test_set(tmp_path / "toy", seed=0), "test", tmp_path / "index")
    counted = evaluate_on_disk(opened, ToyEmbedder(), "toy", CONFIG, ["BM25"])
    assert list(counted.modes) == ["BM25"]
    assert not list((tmp_path / "index").glob("index-*")), "BM25 needs no model"
    first = evaluate_on_disk(opened, ToyEmbedder(), "toy", CONFIG, ["Sparse", "Dense"])
    assert list(first.modes) == ["Dense", "Sparse"]
    monkeypatch.setattr(build_module, "_encode_shard", lambda *_: pytest.fail("encoded again"))
    again = evaluate_on_disk(
        open_test_set(tmp_path / "toy", "test", tmp_path / "index"), ToyEmbedder(), "toy", CONFIG, ["Dense"]
    )
    assert again.modes["Dense"] == first.modes["Dense"]
    with pytest.raises(ConfigError, match="modes = 'dense': must be among Dense, Sparse"):
        evaluate_on_disk(opened, ToyEmbedder(), "toy", CONFIG, ["dense"])


def test_documents_are_found_by_place_with_their_own_ids(tmp_path):
    records = [("a", "x"), ("b", "y"), ("ü", "x"), ("d", " "), ("e", ""), ("f", "z"), ("g", "x")]
    written = write_documents(iter(records), tmp_path / "docs")
    for documents in (written, open_documents(tmp_path / "docs")):
        assert list(documents.ids) == [name for name, _ in records]
        assert documents.texts[1:5] == ["y", "x", "", ""]
        assert documents.ids[-1] == "g"
        with pytest.raises(IndexError):
            documents.ids[7]
        assert documents.pool_rows.tolist() == [0, 1, 0, 2, 2, 3, 0]
        assert documents.copies.tolist() == [3, 1, 2, 1]


@pytest.mark.parametrize("num_hits", [1, 2, 3, 4, 6, 50])
def test_the_best_rows_stand_for_the_best_documents(tmp_path, num_hits):
    generator = np.random.default_rng(num_hits)
    texts = [f"t{n}" for n in generator.integers(0, 12, size=40)]
    documents = write_documents(((f"d{n}", text) for n, text in enumerate(texts)), tmp_path / "docs")
    # few distinct scores, so that different texts tie
    scores = torch.tensor(generator.integers(0, 4, size=(5, len(documents.pool))) / 4, dtype=torch.float32)
    rows = torch.arange(len(documents.pool)).expand(5, -1)
    found = documents.expand(sort_by_score(scores, rows, num_hits), num_hits)
    for query in range(5):
        of_documents = scores[query][torch.tensor(documents.pool_rows).long()].tolist()
        best = sorted(range(40), key=lambda document: (-of_documents[document], document))[:num_hits]
        assert found.rows_QK[query].tolist() == best
        assert found.scores_QK[query].tolist() == [of_documents[document] for document in best]


def test_places_without_a_hit_stay_empty(tmp_path):
    documents = write_documents([("a", "x"), ("b", "x"), ("c", "y")], tmp_path / "docs")
    hits = Hits(torch.tensor([[1.0, -torch.inf], [0.5, 0.4]]), torch.tensor([[0, NO_ROW], [1, 0]]))
    found = documents.expand(hits, 3)
    assert found.rows_QK.tolist() == [[0, 1, NO_ROW], [2, 0, 1]]
    assert found.scores_QK.tolist()[0] == [1.0, 1.0, -torch.inf]


def test_bm25_on_disk_scores_as_in_memory(tmp_path, small_shards):
    opened = open_test_set(write_test_set(tmp_path / "toy", seed=5), "test", tmp_path / "index")
    embedder, documents = ToyEmbedder(), opened.documents
    spec = CountsSpec(passages="p", num_passages=len(documents.pool), max_tokens=99, tokenizer="t")
    counts = count_tokens(
        documents.pool, lambda texts: embedder.token_arrays(texts, max_tokens=99), tmp_path / "c", spec
    )
    queries = [*tokenize(opened.dataset.queries, 99), [0, 5, 5, 5, 2], [0, 1000, 2], [0, 2]]
    found = bm25_on_disk(counts, documents, [np.array(ids) for ids in queries], 30)
    wanted = bm25_hits(queries, tokenize(list(documents.texts), 99), 30)
    width = found.rows_QK.shape[1]
    assert found.rows_QK.tolist() == wanted.rows_QK[:, :width].tolist()
    torch.testing.assert_close(found.scores_QK, wanted.scores_QK[:, :width], rtol=1e-5, atol=1e-6)
    with pytest.raises(DataError, match="were made from something else; remove the folder"):
        count_tokens(
            documents.pool,
            embedder.token_arrays,
            tmp_path / "c",
            CountsSpec(**{**vars(spec), "max_tokens": 9}),
        )


def test_bm25_on_disk_knows_tokenizers_that_put_one_special_token(tmp_path, small_shards):
    class LastTokenOnly(ToyEmbedder):
        def token_arrays(self, texts, *, max_tokens):
            return [ids[1:] for ids in super().token_arrays(texts, max_tokens=max_tokens)]

    folder = write_test_set(tmp_path / "toy", seed=5)
    results = [
        evaluate_on_disk(
            open_test_set(folder, "test", tmp_path / name), embedder, "toy", CONFIG, modes=["BM25"]
        )
        for name, embedder in (("both", ToyEmbedder()), ("last", LastTokenOnly()))
    ]
    assert results[0].modes == results[1].modes


def _corpus(folder: Path, *lines: str) -> Path:
    write_test_set(folder, seed=0)
    (folder / "corpus.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), r"holds no passage \(0 empty texts\)"),
        (('{"_id": "d1", "text": " "}',), r"holds no passage \(1 empty texts\)"),
        (
            ('{"_id": "d1", "text": "4"}', '{"_id": "d1", "text": "5"}'),
            "passage 2 = 'd1': this `_id` was there",
        ),
        (('{"_id": "d1", "text": "4"}', "{"), r"corpus\.jsonl:2 = '{': is not JSON"),
        (('{"_id": "other", "text": "4"}',), "names a passage that corpus.jsonl does not hold"),
    ],
)
def test_what_is_wrong_with_a_corpus_is_said(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        open_test_set(_corpus(tmp_path / "toy", *lines), "test", tmp_path / "index")


def test_a_missing_corpus_and_damaged_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"corpus\.jsonl'.* is not there"):
        open_test_set(tmp_path / "nowhere", "test", tmp_path / "index")
    assert count_passages(tmp_path / "nowhere") == 0
    folder = write_test_set(tmp_path / "toy", seed=0)
    assert count_passages(folder) == 70
    opened = open_test_set(folder, "test", tmp_path / "index")
    evaluate_on_disk(opened, ToyEmbedder(), "toy", CONFIG, ["BM25"])
    (file,) = (tmp_path / "index").glob("counts-*/shards/00000/rows.npy")
    file.write_bytes(b"")
    with pytest.raises(DataError, match=r"rows\.npy'.*cannot be read.*remove its folder"):
        evaluate_on_disk(opened, ToyEmbedder(), "toy", CONFIG, ["BM25"])
    (ids,) = (tmp_path / "index").glob("documents-*/ids.bin")
    ids.write_bytes(b"x")
    with pytest.raises(DataError, match="holds no readable documents.*do not belong together"):
        open_test_set(folder, "test", tmp_path / "index")
