import shutil
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from megam3.data import tokenizer as tokenizer_module
from megam3.data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer
from megam3.errors import ConfigError
from tests.factory import make_sentences, write_tiny_tokenizer


@pytest.mark.parametrize("max_tokens", [3, 8, 20, 512])
def test_equals_transformers_with_truncation(tokenizer, tokenizer_folder, max_tokens):
    texts = [*make_sentences(40), "x", "😀 żółć 漢字", "two\nlines  and   spaces"]
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    wanted = reference(texts, truncation=True, max_length=max_tokens)["input_ids"]
    encoded, num_cut = tokenizer.encode(texts, max_tokens)
    assert [ids.tolist() for ids in encoded] == wanted
    assert num_cut == sum(len(ids) > max_tokens for ids in reference(texts)["input_ids"])


def test_special_tokens_and_size(tokenizer, tokenizer_folder):
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert tokenizer.special_ids == tuple(sorted(reference.all_special_ids))
    assert tokenizer.vocab_size == len(reference)
    assert (tokenizer.prefix, tokenizer.suffix) == ((reference.cls_token_id,), (reference.sep_token_id,))


def test_travels_as_json(tokenizer):
    copy = Tokenizer.from_json(tokenizer.to_json())
    text = make_sentences(1)
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode(text, 99)[0][0].tolist() == tokenizer.encode(text, 99)[0][0].tolist()


def test_other_vocabulary_has_another_fingerprint(tokenizer, tmp_path):
    write_tiny_tokenizer(tmp_path, vocab_size=200)
    assert load_tokenizer(tmp_path).fingerprint != tokenizer.fingerprint


def test_decode_is_readable(tokenizer):
    text = make_sentences(1)[0]
    assert tokenizer.decode(tokenizer.encode([text], 512)[0][0], skip_special_tokens=True) == text


@pytest.mark.parametrize("rows", [100, 250_002])
def test_vocabulary_that_is_not_the_models(tokenizer, tokenizer_folder, rows):
    with pytest.raises(
        ConfigError,
        match=rf"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {rows}"
        rf" rows; use the tok",
    ):
        load_tokenizer(tokenizer_folder, vocab_size=rows)


def test_padded_embedding_is_accepted(tokenizer, tokenizer_folder):
    load_tokenizer(tokenizer_folder, vocab_size=tokenizer.vocab_size + 63)


def test_room_of_a_hundredth_is_accepted_in_a_large_vocabulary():
    qwen = SimpleNamespace(vocab_size=151_669)
    check_vocabulary(qwen, 151_936, "Qwen3-Embedding-0.6B")
    with pytest.raises(
        ConfigError, match="the tokenizer has 151669 tokens, the model's embedding 153600 rows"
    ):
        check_vocabulary(qwen, 153_600, "other")


def test_missing_folder():
    with pytest.raises(ConfigError, match=r"model.path = '/nowhere': is not a folder"):
        load_tokenizer("/nowhere")


def test_folder_without_tokenizer(tmp_path):
    with pytest.raises(
        ConfigError, match=r"model.path = .*: holds no tokenizer that can be read .*; put tokenizer.json"
    ):
        load_tokenizer(tmp_path)


def test_five_token_trap(tokenizer_folder, tmp_path):
    """transformers 5 makes a vocabulary of five tokens of a folder whose SentencePiece file it does not
    find."""
    shutil.copy(tokenizer_folder / "tokenizer_config.json", tmp_path)
    with pytest.raises(ConfigError, match=r"model.path"):
        load_tokenizer(tmp_path, vocab_size=600)


def test_texts_of_many_characters_share_no_call(tokenizer, monkeypatch):
    """The same ids, in as many calls as the bound on their characters asks for."""
    texts = [*make_sentences(30), " ".join(make_sentences(20)), "x"]
    expected = [ids.tolist() for ids in tokenizer.encode(texts, 32)[0]]
    copy = Tokenizer.from_json(tokenizer.to_json())
    backend, sizes = copy._backend, []

    class Counting:
        def encode_batch_fast(self, some, add_special_tokens):
            sizes.append(sum(map(len, some)) if len(some) > 1 else 0)
            return backend.encode_batch_fast(some, add_special_tokens=add_special_tokens)

    copy._backend = Counting()
    monkeypatch.setattr(tokenizer_module, "CHARACTERS_PER_CALL", 200)
    assert [ids.tolist() for ids in copy.encode(texts, 32)[0]] == expected
    assert len(sizes) > 5
    assert max(sizes) <= 200
    assert copy.encode([], 32) == ([], 0)
