"""Small real artefacts for tests: made-up sentences, a sentencepiece tokenizer trained on them, tiny encoders
in the published layout.

Nothing is downloaded; everything is a function of its seed.

    folder = make_tiny_model_folder(tmp_path)  # XLM-R, 2 layers × 32, vocabulary about 600, with both heads
    load_m3(folder, ModelConfig(path=str(folder)))
"""

import functools
import io
import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import torch
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


@functools.lru_cache(maxsize=8)
def _words(num_words: int, seed: int) -> tuple[str, ...]:
    rng = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bcdfgklmnprstvzäж" for vowel in "aeiou"]
    return tuple("".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(num_words))


def make_sentences(count: int, *, seed: int = 0, min_words: int = 4, max_words: int = 14) -> list[str]:
    """`count` made-up sentences over a fixed vocabulary of 500 words, so that a tokenizer trained on some
    covers the others."""
    rng = random.Random(f"sentences {seed}")
    words = _words(500, 0)
    return [" ".join(rng.choices(words, k=rng.randint(min_words, max_words))) for _ in range(count)]


@functools.lru_cache(maxsize=4)
def _sentencepiece_model(vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_sentences(600)),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="unigram",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return model.getvalue()


def write_tiny_tokenizer(folder: Path, *, vocab_size: int = 600, max_tokens: int = 512) -> int:
    """An XLM-R tokenizer (slow and fast files) into `folder`; returns its length, which is at most
    `vocab_size` + 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sentencepiece.bpe.model").write_bytes(_sentencepiece_model(vocab_size))
    config = {**SPECIAL_TOKENS, "model_max_length": max_tokens, "tokenizer_class": "XLMRobertaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL_TOKENS, indent=2))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    # the fast tokenizer's own file; tokenizer_config.json stays as written above, since transformers 5 writes
    # one that 4.x cannot read
    tokenizer.backend_tokenizer.save(os.fspath(folder / "tokenizer.json"))
    return len(tokenizer)


def tiny_config(
    vocab_size: int, *, hidden_size: int = 32, num_layers: int = 2, num_heads: int = 2, max_tokens: int = 512
) -> XLMRobertaConfig:
    """An XLM-R config with XLM-R's real special ids, offset and epsilon; weights wide enough for attention to
    differ between tokens."""
    return XLMRobertaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=max_tokens + 2,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        layer_norm_eps=1e-5,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def make_tiny_model_folder(
    folder: Path,
    *,
    hidden_size: int = 32,
    num_layers: int = 2,
    num_heads: int = 2,
    max_tokens: int = 512,
    vocab_size: int = 600,
    multi_vector_dim: int | None = None,
    heads: bool = True,
    dropout: float = 0.0,
    seed: int = 0,
) -> Path:
    """A tiny XLM-R encoder, its tokenizer and (unless `heads` is False) random heads, all written to
    `folder`, which is returned."""
    num_tokens = write_tiny_tokenizer(folder, vocab_size=vocab_size, max_tokens=max_tokens)
    config = tiny_config(
        num_tokens, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads, max_tokens=max_tokens
    )
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        XLMRobertaModel(config).save_pretrained(folder)
        if heads:
            width = multi_vector_dim or hidden_size
            torch.save(
                {
                    "weight": torch.randn(width, hidden_size) / hidden_size**0.5,
                    "bias": torch.randn(width) * 0.1,
                },
                folder / "colbert_linear.pt",
            )
            torch.save(
                {"weight": torch.randn(1, hidden_size) * 0.1, "bias": torch.ones(1)},
                folder / "sparse_linear.pt",
            )
    return folder


def random_token_ids(lengths: Sequence[int], *, vocab_size: int = 300, seed: int = 0) -> list[list[int]]:
    """Token id lists of the given lengths, `<s>` first and `</s>` last (a length of 1 is `<s>` alone),
    ordinary ids from 4 up between."""
    rng = random.Random(seed)
    texts = []
    for length in lengths:
        body = [rng.randrange(4, vocab_size) for _ in range(max(0, length - 2))]
        texts.append([0, *body, 2][:length] if length > 1 else [0])
    return texts
