"""Tokenizer and encoder are built once: both are read by several checks."""

import math
import random
from collections import Counter

import numpy as np
import pytest
import sentencepiece as spm
import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from examples.quickstart.encoder import (
    EncoderInit,
    EncoderSize,
    build_encoder,
    count_pieces,
    find_topics,
    measure_rarity,
    rarity_coordinates,
)
from examples.quickstart.tokenizer import train_tokenizer
from megam3.errors import DataError

WORDS = [
    "".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyzäéя日", k=3 + i % 6)) for i in range(300)
]
TEXTS = [
    " ".join(random.Random(1000 + i).choices(WORDS, weights=range(1, 301), k=25)) + "." for i in range(200)
]
SIZE = EncoderSize(num_layers=2, hidden_size=64, num_heads=4, intermediate_size=96, max_tokens=128)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_tokenizer(TEXTS, folder, vocab_size=400, max_tokens=128, num_threads=1)
    model = build_encoder(tokenizer, TEXTS, folder, SIZE, EncoderInit(), seed=3)
    return folder, tokenizer, model.eval()


def test_ids_are_sentencepieces_shifted_by_one_in_xlmr_layout(built):
    folder, tokenizer, _ = built
    pieces = spm.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    assert len(tokenizer) == pieces.get_piece_size() + 2
    assert tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "</s>", "<unk>", "<mask>"]) == [
        0,
        1,
        2,
        3,
        len(tokenizer) - 1,
    ]
    for text in [*TEXTS[:50], "Wort mit Ω unbekannt", "  zwei   Räume\nneue Zeile"]:
        expected = [0, *[3 if piece == 0 else piece + 1 for piece in pieces.encode(text)], 2]
        assert tokenizer(text)["input_ids"] == expected


def test_saved_folder_loads_again_with_equal_ids(built):
    folder, tokenizer, _ = built
    again = AutoTokenizer.from_pretrained(folder)
    assert again.model_max_length == 128
    assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


def test_too_little_text_is_an_error(tmp_path):
    with pytest.raises(DataError, match="tokenizer text = .*sentencepiece cannot learn from it"):
        train_tokenizer([], tmp_path)


def test_rarity_is_the_root_of_the_idf(built):
    _, tokenizer, _ = built
    rarity = measure_rarity(count_pieces(tokenizer, TEXTS))
    frequency = Counter(token for ids in tokenizer(TEXTS)["input_ids"] for token in set(ids))
    for token in sorted(token for token in frequency if token > 3)[::29]:
        idf = math.log(1 + (len(TEXTS) - frequency[token] + 0.5) / (frequency[token] + 0.5))
        assert rarity.rarity_V[token].item() ** 2 == pytest.approx(idf, rel=1e-5)
    counted = [
        rarity.rarity_V[token].item() for token, count in frequency.items() if token > 3 for _ in range(count)
    ]
    assert rarity.mean == pytest.approx(sum(counted) / len(counted), rel=0.02)


def test_topics_are_the_truncated_svd(built):
    _, tokenizer, _ = built
    counts = count_pieces(tokenizer, TEXTS[:30])
    rarity = measure_rarity(counts)
    matrix = np.zeros((30, len(tokenizer)))
    for row, ids in enumerate(tokenizer(TEXTS[:30])["input_ids"]):
        for token, times in Counter(ids).items():
            if token > 3:
                matrix[row, token] = (1 + math.log(times)) * rarity.rarity_V[token].item() ** 2
        matrix[row] /= np.linalg.norm(matrix[row])
    _, singular, right = np.linalg.svd(matrix, full_matrices=False)
    expected = right.T * np.sqrt(singular)
    topics = find_topics(counts, rarity, 30, seed=0).numpy()
    # the same up to the signs of the directions, which leave products between pieces unchanged
    used = sorted({int(token) for token in counts.ids_Z})
    expected = expected[used] / np.linalg.norm(expected[used], axis=1, keepdims=True)
    np.testing.assert_allclose(topics[used] @ topics[used].T / 30, expected @ expected.T, atol=2e-3)


def test_config_is_xlmrs(built):
    folder, tokenizer, _ = built
    config = AutoConfig.from_pretrained(folder)
    assert (config.layer_norm_eps, config.type_vocab_size, config.max_position_embeddings) == (1e-5, 1, 130)
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_id, config.vocab_size) == (
        0,
        1,
        2,
        len(tokenizer),
    )


def test_folder_holds_the_model_and_both_heads(built):
    folder, _, model = built
    again = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
    lexical = torch.load(folder / "sparse_linear.pt", weights_only=True)
    multi = torch.load(folder / "colbert_linear.pt", weights_only=True)
    assert (lexical["weight"].shape, lexical["bias"].shape) == ((1, 64), (1,))
    assert torch.equal(multi["weight"], torch.eye(64))


def hidden_states(built, text):
    _, tokenizer, model = built
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return ids[0], model(input_ids=ids).last_hidden_state[0]


def test_the_lexical_head_starts_by_reading_rarity(built):
    folder, tokenizer, _ = built
    lexical = torch.load(folder / "sparse_linear.pt", weights_only=True)
    rarity = measure_rarity(count_pieces(tokenizer, TEXTS))
    ids, hidden = hidden_states(built, TEXTS[0])
    weights = torch.relu(hidden @ lexical["weight"][0] + lexical["bias"])[1:-1]
    correlation = torch.corrcoef(torch.stack([weights, rarity.rarity_V[ids[1:-1]]]))[0, 1]
    assert correlation > 0.8


def test_the_start_token_reads_the_text_from_the_start(built):
    dense = torch.stack(
        [torch.nn.functional.normalize(hidden_states(built, text)[1][0], dim=0) for text in TEXTS[:8]]
    )
    cosines = dense @ dense.T
    assert cosines[~torch.eye(8, dtype=torch.bool)].max() < 0.99


def test_gains_of_zero_leave_plain_noise(built, tmp_path):
    _, tokenizer, _ = built
    init = EncoderInit(query_key_gain=0, value_output_gain=0, rarity_gain=0, topic_share=0)
    model = build_encoder(tokenizer, TEXTS, tmp_path, SIZE, init)
    query = model.encoder.layer[0].attention.self.query.weight
    assert query.diagonal().abs().mean() < 0.05
    assert model.embeddings.word_embeddings.weight[
        4:, rarity_coordinates(SIZE)
    ].std().item() == pytest.approx(0.02, rel=0.1)
    assert not torch.load(tmp_path / "sparse_linear.pt", weights_only=True)["weight"].any()


def test_same_seed_same_weights(built, tmp_path):
    _, tokenizer, model = built
    again = build_encoder(tokenizer, TEXTS, tmp_path, SIZE, EncoderInit(), seed=3)
    other = build_encoder(tokenizer, TEXTS, tmp_path, SIZE, EncoderInit(), seed=4)
    name = "encoder.layer.1.output.dense.weight"
    assert torch.equal(model.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(model.get_parameter(name), other.get_parameter(name))
