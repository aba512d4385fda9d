"""M3Embedder against one text at a time through transformers, and its bookkeeping: order, limits, batches."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from megam3.config.weights import HeadWeights
from megam3.embedder import M3Embedder
from megam3.errors import CheckpointError, ConfigError, DataError
from megam3.packed_texts import length_batches
from tests.factory import make_sentences, make_tiny_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model_folder(tmp_path_factory.mktemp("model"), max_tokens=64)


@pytest.fixture(scope="module")
def embedder(folder):
    return M3Embedder(folder, device="cpu")


TEXTS = [*make_sentences(6, seed=1), "x", *make_sentences(3, seed=2, min_words=20, max_words=30), "x"]


def test_texts_come_back_in_order_and_equal_one_at_a_time(folder, embedder):
    got = embedder.encode(TEXTS, batch_tokens=70)
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    heads = [
        torch.load(folder / name, weights_only=True) for name in ("colbert_linear.pt", "sparse_linear.pt")
    ]
    for n, text in enumerate(TEXTS):
        ids = tokenizer(text, truncation=True, max_length=64)["input_ids"]
        with torch.no_grad():
            hidden = encoder(torch.tensor([ids])).last_hidden_state[0]
        multi, logits = (torch.nn.functional.linear(hidden, head["weight"], head["bias"]) for head in heads)
        np.testing.assert_allclose(got.dense_vecs[n], (hidden[0] / hidden[0].norm()).numpy(), atol=1e-5)
        np.testing.assert_allclose(
            got.colbert_vecs[n], (multi / multi.norm(dim=-1, keepdim=True))[1:].numpy(), atol=1e-5
        )
        wanted = {}
        for token, weight in zip(ids, logits.squeeze(-1).tolist()):
            if token not in (0, 1, 2, 3) and weight > 0:
                wanted[str(token)] = max(weight, wanted.get(str(token), 0.0))
        assert got.lexical_weights[n] == pytest.approx(wanted, abs=1e-5)


def test_scores_follow_the_definitions(embedder):
    pairs = [(TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[2]), (TEXTS[6], TEXTS[7])]
    encoded = embedder.encode([text for pair in pairs for text in pair])
    got = embedder.score(pairs, weights=HeadWeights(dense=2.0, lexical=0.5, multi_vector=3.0))
    for n in range(len(pairs)):
        q, p = 2 * n, 2 * n + 1
        dense = sum(float(a * b) for a, b in zip(encoded.dense_vecs[q], encoded.dense_vecs[p]))
        shared = encoded.lexical_weights[q].keys() & encoded.lexical_weights[p].keys()
        lexical = sum(
            encoded.lexical_weights[q][token] * encoded.lexical_weights[p][token] for token in shared
        )
        best = [max(float(a @ b) for b in encoded.colbert_vecs[p]) for a in encoded.colbert_vecs[q]]
        multi = sum(best) / len(best)
        wanted = {
            "dense": dense,
            "lexical": lexical,
            "multi_vector": multi,
            "sum": 2 * dense + 0.5 * lexical + 3 * multi,
        }
        for head, value in wanted.items():
            assert got[head][n] == pytest.approx(value, abs=1e-5)
    assert got["dense"][1] == pytest.approx(1, abs=1e-5)
    assert got["multi_vector"][1] == pytest.approx(1, abs=1e-5)


def test_nothing_in_nothing_out(embedder):
    encoded = embedder.encode([])
    assert encoded.dense_vecs.shape == (0, 32)
    assert (encoded.lexical_weights, encoded.colbert_vecs) == ([], [])
    assert embedder.score([])["sum"].shape == (0,)


def test_an_empty_string_is_its_special_tokens(embedder):
    encoded = embedder.encode([""])
    assert encoded.lexical_weights == [{}]
    assert encoded.colbert_vecs[0].shape == (1, 32)


def test_long_texts_are_cut_at_the_models_positions_or_earlier(embedder):
    long = " ".join(make_sentences(20))
    assert embedder.max_tokens == 64
    assert len(embedder.token_ids([long])[0]) == 64
    short = embedder.token_ids([long], max_tokens=10)[0]
    assert (len(short), short[0], short[-1]) == (10, 0, 2)


@pytest.mark.parametrize("limit", [2, 65, -1])
def test_impossible_limits_are_refused(embedder, limit):
    with pytest.raises(
        ConfigError, match=f"max_tokens = {limit}: must be between 3 and 64, what the model has positions for"
    ):
        embedder.encode(["x"], max_tokens=limit)


def test_something_else_than_text_is_refused(embedder):
    with pytest.raises(DataError, match=r"texts\[1\] = None: is not a string; pass a list of strings"):
        embedder.encode(["x", None])


def test_unknown_precision_is_refused(folder):
    with pytest.raises(ConfigError, match="precision = 'int8': must be auto or one of fp32, bf16, fp16"):
        M3Embedder(folder, precision="int8")


def test_an_encoder_without_heads_offers_its_dense_vector_alone(tmp_path):
    embedder = M3Embedder(make_tiny_model_folder(tmp_path, heads=False), device="cpu")
    assert embedder.heads == ("dense",)
    with pytest.raises(ConfigError, match="heads = 'lexical': the model has no lexical head, only dense"):
        embedder.encode(["a"], heads=["lexical"])


def test_progress_counts_every_text_once(embedder):
    seen = []
    embedder.encode(TEXTS, batch_tokens=40, progress=seen.append)
    assert sum(seen) == len(TEXTS)
    assert len(seen) > 1


def test_batches_keep_the_budget_and_lose_nothing():
    lengths = [2, 9, 3, 4, 9, 1]
    batches = list(length_batches(lengths, 8))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(len(batch) == 1 or sum(lengths[i] for i in batch) <= 8 for batch in batches)
    assert [lengths[i] for batch in batches for i in batch] == sorted(lengths, reverse=True)


def test_a_model_in_training_is_borrowed_and_given_back(embedder):
    embedder.model.train()
    borrowed = M3Embedder.from_model(embedder.model, embedder.tokenizer)
    np.testing.assert_array_equal(borrowed.encode(TEXTS).dense_vecs, embedder.encode(TEXTS).dense_vecs)
    assert borrowed.model.training
    assert torch.is_grad_enabled()
    embedder.model.eval()


def test_one_text_gives_its_single_entries(embedder):
    one, many = embedder.encode(TEXTS[0]), embedder.encode(TEXTS[:1])
    np.testing.assert_array_equal(one.dense_vecs, many.dense_vecs[0])
    np.testing.assert_array_equal(one["colbert_vecs"], many["colbert_vecs"][0])
    assert one.lexical_weights == many.lexical_weights[0]
    with pytest.raises(KeyError, match="there are dense_vecs, lexical_weights and colbert_vecs"):
        one["dense"]


def test_one_pair_gives_single_numbers(embedder):
    many = embedder.score([(TEXTS[0], TEXTS[1])])
    for pair in ((TEXTS[0], TEXTS[1]), [TEXTS[0], TEXTS[1]]):
        one = embedder.score(pair)
        assert one == {name: float(values[0]) for name, values in many.items()}
    assert isinstance(one["sum"], float)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ("ab", "pairs = 'ab': is one text, not a pair of texts; pass a list of"),
        (["ab"], r"pairs\[0\] = 'ab': is not a pair of strings"),
        (["a", "b", "c"], r"pairs\[0\] = 'a': is not a pair of strings"),
        ([("a", "b"), ("a", "b", "c")], r"pairs\[1\] = .*: is not a pair of strings"),
    ],
)
def test_what_is_no_pair_is_refused(embedder, pairs, message):
    with pytest.raises(DataError, match=message):
        embedder.score(pairs)


def test_only_the_heads_asked_for_come_back(embedder):
    encoded = embedder.encode(TEXTS, heads=["lexical"])
    assert (encoded.dense_vecs, encoded.colbert_vecs) == (None, None)
    assert encoded.lexical_weights == embedder.encode(TEXTS).lexical_weights
    for heads in (["dense", "sparse"], "dense"):
        with pytest.raises(ConfigError, match="must be a list of dense, lexical, multi_vector"):
            embedder.encode(TEXTS, heads=heads)


def test_dense_vectors_cut_to_a_matryoshka_dimension(embedder):
    whole = embedder.encode(TEXTS).dense_vecs
    cut = embedder.encode(TEXTS, dense_dim=8).dense_vecs
    np.testing.assert_allclose(cut, whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1)[:, None], atol=1e-6)
    np.testing.assert_array_equal(
        embedder.encode(TEXTS, dense_dim=8, normalize=False).dense_vecs, whole[:, :8]
    )
    with pytest.raises(ConfigError, match="dense_dim = 33: must be between 1 and the model's 32"):
        embedder.encode(TEXTS, dense_dim=33)


def test_torch_output_is_the_same(embedder):
    ours, theirs = embedder.encode(TEXTS), embedder.encode(TEXTS, output="torch")
    assert torch.equal(theirs.dense_vecs, torch.from_numpy(ours.dense_vecs))
    assert all(torch.equal(a, torch.from_numpy(b)) for a, b in zip(theirs.colbert_vecs, ours.colbert_vecs))
    with pytest.raises(ConfigError, match="output = 'jax': must be numpy or torch"):
        embedder.encode(TEXTS, output="jax")


def test_tokens_are_those_of_the_transformers_tokenizer(folder, embedder):
    texts = [*TEXTS, "", "Ünïcode ﬁ ２", " ".join(make_sentences(20))]
    theirs = AutoTokenizer.from_pretrained(folder)(texts, truncation=True, max_length=64)["input_ids"]
    assert embedder.token_ids(texts) == theirs


def test_a_name_that_is_no_folder_fails_once(monkeypatch, folder):
    asked = []

    def offline(name, **options):
        asked.append(name)
        raise OSError("no route to the hub\nand a long story")

    monkeypatch.setattr("megam3.model.hub.snapshot_download", offline)
    with pytest.raises(CheckpointError, match="model = 'nope': is no folder on this machine; give the path"):
        M3Embedder("nope")
    assert asked == []
    with pytest.raises(CheckpointError, match=r"the hub cannot be reached \(OSError\); check the network"):
        M3Embedder("owner/nope")
    assert asked == ["owner/nope"]
    with pytest.raises(CheckpointError, match="is a file; give the folder that holds it"):
        M3Embedder(folder / "config.json")
    monkeypatch.setattr("megam3.model.hub.snapshot_download", lambda name, **options: str(folder))
    assert M3Embedder("owner/name", device="cpu").max_tokens == 64


def test_a_device_that_is_not_there_is_refused(folder, embedder):
    missing = torch.cuda.device_count()
    with pytest.raises(
        ConfigError, match=f"device = 'cuda:{missing}': this machine has {missing} CUDA devices"
    ):
        M3Embedder(folder, device=f"cuda:{missing}")
    with pytest.raises(ConfigError, match="device = 'gpu': is no device that torch knows"):
        embedder.encode(TEXTS, device="gpu")
    assert embedder.encode(TEXTS[:1], device="cpu").dense_vecs.shape == (1, 32)


def test_a_bar_is_drawn_on_stderr_when_asked(embedder, capsys):
    embedder.encode(TEXTS, show_progress=True)
    assert "encoding" in capsys.readouterr().err
    embedder.encode(TEXTS)
    assert capsys.readouterr().err == ""
