"""An indexed corpus against the search that holds everything in memory, and what matched in a passage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megam3.config.schema import EvaluationConfig
from megam3.embedder import M3Embedder
from megam3.errors import DataError
from megam3.model.encoded import lexical_match
from megam3.retrieval.corpus import Corpus, open_corpus
from megam3.retrieval.index.build import EncodeOptions
from megam3.retrieval.index.modes import FIVE_MODES
from megam3.retrieval.matches import matched_segments
from tests.factory import make_sentences, make_tiny_model_folder
from tests.families import make_family_folder

CONFIG = EvaluationConfig(rerank_dense=20, rerank_hybrid=30)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def embedder(model: Path) -> M3Embedder:
    return M3Embedder(str(model))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    file = tmp_path / "pages.jsonl"
    sentences = make_sentences(80, seed=1, max_words=30)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences))
    return file


def opened(embedder: M3Embedder, model: Path, texts: Path, *, multi_vector: bool = True) -> Corpus:
    # float32, so that the reference below is met to rounding
    options = EncodeOptions(max_tokens=512, multi_vector=multi_vector, dense_dtype="float32")
    return open_corpus(embedder, str(model), [str(texts)], texts.with_suffix(".index"), options, CONFIG)


def naive_rankings(embedder: M3Embedder, query: str, passages: list[str]) -> dict[str, list[int]]:
    """The definitions of the five modes, over full score vectors; passages in float16, as on disk."""
    q, p = embedder.encode(query), embedder.encode(passages)
    half = [{token: float(np.float16(weight)) for token, weight in w.items()} for w in p.lexical_weights]
    dense = p.dense_vecs @ q.dense_vecs
    lexical = np.array([lexical_match(q.lexical_weights, weights) for weights in half])
    rows_of = [rows.astype(np.float16).astype(np.float32) for rows in p.colbert_vecs]
    multi = np.array([(q.colbert_vecs @ rows.T).max(axis=1).mean() for rows in rows_of])
    by_dense = np.argsort(-dense, kind="stable").tolist()
    by_lexical = [row for row in np.argsort(-lexical, kind="stable").tolist() if lexical[row] > 0]
    both = sorted(set(by_dense[: CONFIG.rerank_hybrid]) | set(by_lexical[: CONFIG.rerank_hybrid]))

    def ranked(rows: list[int], scores: np.ndarray) -> list[int]:
        return sorted(rows, key=lambda row: -scores[row])

    return {
        "Dense": by_dense,
        "Sparse": by_lexical,
        "Multi-vec": ranked(by_dense[: CONFIG.rerank_dense], multi),
        "Dense+Sparse": ranked(both, dense + 0.3 * lexical),
        "All": ranked(both, dense + 0.3 * lexical + multi),
    }


@pytest.mark.parametrize("multi_vector", [True, False])
def test_five_modes_are_those_of_full_score_vectors(
    embedder: M3Embedder, model: Path, texts: Path, multi_vector: bool
) -> None:
    corpus = opened(embedder, model, texts, multi_vector=multi_vector)
    passages = corpus.pool.texts(0, len(corpus.pool))
    for query in make_sentences(4, seed=9):
        answer = corpus.search(query, 8)
        expected = naive_rankings(embedder, query, passages)
        assert list(answer.rankings) == list(FIVE_MODES)
        for mode, ranking in answer.rankings.items():
            assert [found.row for found in ranking] == expected[mode][:8], mode
            assert all(found.text == passages[found.row] for found in ranking)


def test_candidates_are_the_same_in_small_slices(
    embedder: M3Embedder, model: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = opened(embedder, model, texts)
    (query,) = make_sentences(1, seed=9)
    whole = corpus.search(query, 8).rankings
    monkeypatch.setattr("megam3.retrieval.index.modes.GATHERED_BYTES", 1)  # a passage at a time
    for mode, ranking in corpus.search(query, 8).rankings.items():
        assert [found.row for found in ranking] == [found.row for found in whole[mode]], mode
        assert [found.score for found in ranking] == pytest.approx([found.score for found in whole[mode]])


def test_what_matched_adds_up_to_the_scores(embedder: M3Embedder, model: Path, texts: Path) -> None:
    corpus = opened(embedder, model, texts)
    # every word once, so that no id is counted at several places
    passage = corpus.pool.text(3)
    query = " ".join(passage.split()[:3])
    answer = corpus.search(query, 1)
    row = answer.rankings["Multi-vec"][0].row
    segments = answer.segments[row]
    assert "".join(segment.text for segment in segments) == corpus.pool.text(row)
    scores = embedder.score((query, corpus.pool.text(row)))
    in_text = sum(segment.multi_vector for segment in segments)
    # the last token, `</s>`, may be picked, too, and has no text
    assert 0 < in_text <= scores["multi_vector"] + 1e-3
    best = answer.rankings["Sparse"][0]
    matched = {s.text.strip() for s in answer.segments[best.row] if s.lexical > 0}
    ids = set(embedder.token_ids([query])[0]) & set(embedder.token_ids([best.text])[0])
    assert len(matched) >= 1
    assert len(ids) > 2  # more than the special ones


def test_an_index_is_opened_again_and_another_model_makes_another(
    embedder: M3Embedder, model: Path, texts: Path, tmp_path: Path
) -> None:
    folder = opened(embedder, model, texts).index.folder
    before = (folder / "shards" / "00000" / "dense.npy").stat().st_mtime_ns
    assert opened(embedder, model, texts).index.folder == folder
    assert (folder / "shards" / "00000" / "dense.npy").stat().st_mtime_ns == before
    other = make_tiny_model_folder(tmp_path / "other", seed=1)
    assert opened(M3Embedder(str(other)), other, texts).index.folder != folder
    with texts.open("a") as stream:
        stream.write(json.dumps({"text": "one more"}) + "\n")
    again = opened(embedder, model, texts)
    assert again.index.folder != folder
    assert len(again.pool) == 81


def test_empty_and_missing_files_are_refused(embedder: M3Embedder, model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": " "}\n')
    with pytest.raises(DataError, match="holds no passage"):
        opened(embedder, model, empty)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "x"}\n{"txt": "y"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl:2.*must hold a string under `text`"):
        opened(embedder, model, bad)
    with pytest.raises(DataError, match="nowhere"):
        opened(embedder, model, tmp_path / "nowhere.jsonl")


def test_a_text_beyond_the_limit_is_shown_whole(embedder: M3Embedder) -> None:
    (text,) = make_sentences(1, seed=5, min_words=30, max_words=30)
    (segments,) = matched_segments(embedder, text[:40], [text], max_tokens=8)
    assert "".join(segment.text for segment in segments) == text
    assert segments[-1].lexical == segments[-1].multi_vector == 0


@pytest.mark.parametrize("multi_vector", [True, False])
def test_a_model_whose_texts_begin_with_a_word_has_a_row_for_it(tmp_path: Path, multi_vector: bool) -> None:
    """Qwen 3's tokenizer puts no token first: every token has a multi-vector row, in the index too."""
    folder = make_family_folder(tmp_path / "model", "qwen3")
    make_heads(folder)
    embedder, texts = M3Embedder(folder, device="cpu"), make_sentences(12, seed=1)
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = opened(embedder, folder, tmp_path / "pages.jsonl", multi_vector=multi_vector)
    answer = corpus.search(texts[3], 5)
    expected = naive_rankings(embedder, texts[3], texts)
    for mode, ranking in answer.rankings.items():
        assert [found.row for found in ranking] == expected[mode][:5], mode
    assert answer.rankings["Multi-vec"][0].row == 3
    shares = [(segment.text, segment.multi_vector) for segment in answer.segments[3]]
    assert "".join(text for text, _ in shares) == texts[3]
    first = embedder.encode(texts[3]).colbert_vecs
    assert len(first) == len(embedder.token_ids([texts[3]])[0])
    # each token of the text finds itself: the first word contributes like the others
    assert shares[0][1] > 0


def make_heads(folder: Path) -> None:
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    torch.manual_seed(1)
    rows = {"weight": torch.randn(8, width) / width**0.5, "bias": torch.zeros(8)}
    torch.save(rows, folder / "colbert_linear.pt")
    torch.save({"weight": torch.randn(1, width), "bias": torch.ones(1)}, folder / "sparse_linear.pt")
