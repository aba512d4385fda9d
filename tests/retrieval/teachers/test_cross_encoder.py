"""Cross-encoders against a plain transformers loop, one pair at a time."""

import json

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    XLMRobertaForSequenceClassification,
)

from megam3.errors import CheckpointError, ConfigError
from megam3.retrieval.teachers.base import kind_of, padded_batches, score_unique
from megam3.retrieval.teachers.cross_encoder import CrossEncoder
from tests.factory import make_sentences, make_tiny_model_folder, tiny_config, write_tiny_tokenizer

TEXTS = make_sentences(14, seed=5, min_words=2, max_words=20)
PAIRS = [(TEXTS[n % 5], TEXTS[n]) for n in range(14)] + [("", TEXTS[0]), (TEXTS[0], " ".join(TEXTS))]


def make_folder(folder, num_labels, family="xlm-roberta"):
    size = write_tiny_tokenizer(folder, max_tokens=64)
    torch.manual_seed(num_labels)
    if family == "bert":
        config = BertConfig(
            vocab_size=size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=64,
            pad_token_id=1,
            initializer_range=0.2,
            num_labels=num_labels,
        )
        BertForSequenceClassification(config).save_pretrained(folder)
    else:
        config = tiny_config(size, max_tokens=64)
        config.num_labels = num_labels
        XLMRobertaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def naive(folder, pairs, limit):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for query, passage in pairs:
        inputs = tokenizer(query, passage, truncation="longest_first", max_length=limit, return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0]
        scores.append(float(logits[0] if len(logits) == 1 else torch.log_softmax(logits, 0)[1].exp().logit()))
    return scores


@pytest.mark.parametrize("family", ["xlm-roberta", "bert"])
@pytest.mark.parametrize("num_labels", [1, 2])
def test_scores_are_those_of_one_pair_at_a_time(tmp_path, num_labels, family):
    folder = make_folder(tmp_path, num_labels, family)
    got = CrossEncoder(folder, device="cpu", max_tokens=40, batch_tokens=150).score(PAIRS)
    assert got.tolist() == pytest.approx(naive(folder, PAIRS, 40), abs=1e-4)
    assert len({round(score, 4) for score in got.tolist()}) > 10


def test_nothing_in_nothing_out(tmp_path):
    assert CrossEncoder(make_folder(tmp_path, 1), device="cpu").score([]).shape == (0,)


def test_the_limit_is_what_the_model_has_positions_for(tmp_path):
    folder = make_folder(tmp_path, 1)
    assert CrossEncoder(folder, device="cpu").max_tokens == 64
    with pytest.raises(ConfigError, match="--max-tokens = 65: must be between 5 and 64"):
        CrossEncoder(folder, device="cpu", max_tokens=65)
    with pytest.raises(ConfigError, match="precision = 'int8': must be auto or one of fp32, bf16, fp16"):
        CrossEncoder(folder, device="cpu", precision="int8")


def test_more_labels_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has 3 labels; a re-ranker has one or two"):
        CrossEncoder(make_folder(tmp_path, 3), device="cpu")


def test_a_folder_without_weights_is_refused(tmp_path):
    folder = make_folder(tmp_path, 1)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no cross-encoder that transformers can load"):
        CrossEncoder(folder, device="cpu")


def test_folders_are_told_apart(tmp_path):
    assert kind_of(make_folder(tmp_path / "a", 1)) == "cross-encoder"
    encoder = make_tiny_model_folder(tmp_path / "b")
    assert kind_of(str(encoder)) == "megam3"
    (encoder / "sparse_linear.pt").unlink()
    assert kind_of(str(encoder)) == "megam3"
    (encoder / "colbert_linear.pt").unlink()
    message = "is no teacher that is known: no sparse_linear.pt, no colbert_linear.pt, no …ForSeq"
    with pytest.raises(CheckpointError, match=message):
        kind_of(str(encoder))
    (encoder / "modules.json").write_text(json.dumps([]))
    assert kind_of(str(encoder)) == "bi-encoder"
    (encoder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="has a config.json that cannot be read"):
        kind_of(str(encoder))


def test_padded_batches_keep_the_budget_and_lose_nothing():
    lengths = [2, 9, 3, 4, 9, 1, 30]
    batches = list(padded_batches(lengths, 12))
    assert sorted(n for batch in batches for n in batch) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[n] for n in b) <= 12 for b in batches)


def test_a_pair_is_scored_once(tmp_path):
    asked = []

    def score(pairs):
        asked.extend(pairs)
        return torch.arange(len(pairs)).float().numpy()

    assert score_unique([("a", "b"), ("c", "d"), ("a", "b")], score).tolist() == [0, 1, 0]
    assert asked == [("a", "b"), ("c", "d")]
