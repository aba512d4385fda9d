"""Text to token ids, the same way in preparation, training, evaluation and inference.

A `Tokenizer` wraps the Rust tokenizer of a Hugging Face folder. It travels to worker processes as its own
JSON, so that they need neither transformers nor torch. Truncation keeps the special tokens: with `<s>` = 0,
`</s>` = 2 and a limit of 4 tokens,

    0 7 8 9 5 2   →   0 7 8 2
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from megam3.errors import ConfigError

# Embedding matrices are padded up to a multiple of a power of two for speed, and some leave room for tokens
# to come (Qwen 3: 151 669 tokens, 151 936 rows); a larger gap means a broken or foreign tokenizer.
MAX_UNUSED_ROWS = 256
CHARACTERS_PER_CALL = 1 << 20
"""The Rust tokenizer holds about 105 bytes a character of all texts of a call; ordinary calls have fewer."""
MAX_UNUSED_SHARE = 0.01
"""Of the tokenizer's ids, where that is more."""


class Tokenizer:
    """Token ids of texts, and the few facts about the vocabulary that the rest of megam3 needs."""

    def __init__(self, backend: tokenizers.Tokenizer, special_tokens: dict[str, int]):
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_tokens = dict(sorted(special_tokens.items()))
        """Ids by role: cls, sep, pad, unk, mask, as far as the tokenizer has them."""
        self.prefix, self.suffix = self._frame()
        """Ids put before and after every text, e.g. (0,) and (2,) for XLM-R."""
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        """Ids run from 0 to vocab_size - 1."""
        self.fingerprint = hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()
        """Changes when any id of any text could change."""

    def _frame(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        framed, bare = (self._backend.encode("a", add_special_tokens=x).ids for x in (True, False))
        starts = [i for i in range(len(framed) - len(bare) + 1) if framed[i : i + len(bare)] == bare]
        first = starts[0] if starts else 0
        return tuple(framed[:first]), tuple(framed[first + len(bare) :])

    def encode(self, texts: Sequence[str], max_tokens: int) -> tuple[list[np.ndarray], int]:
        """Ids of each text as int32, special tokens included, at most `max_tokens`; and how many were cut."""
        encoded, cut_N = self.encode_marking(texts, max_tokens)
        return encoded, sum(cut_N)

    def encode_marking(self, texts: Sequence[str], max_tokens: int) -> tuple[list[np.ndarray], list[bool]]:
        """As `encode`, but says of each text whether it was cut."""
        arrays, cut_N = [], []
        keep = max_tokens - len(self.suffix)
        for some in _by_characters(texts):
            for encoding in self._backend.encode_batch_fast(some, add_special_tokens=True):
                ids = np.asarray(encoding.ids, dtype=np.int32)
                cut_N.append(len(ids) > max_tokens)
                if cut_N[-1]:
                    ids = np.concatenate([ids[:keep], np.asarray(self.suffix, dtype=np.int32)])
                arrays.append(ids)
        return arrays, cut_N

    def offsets(self, texts: Sequence[str], max_tokens: int) -> list[list[tuple[int, int]]]:
        """Characters start … stop-1 of each token that `encode` keeps; (0, 0) for the prefix and suffix."""
        keep = max_tokens - len(self.suffix)
        spans = []
        for encoding in self._backend.encode_batch(list(texts), add_special_tokens=True):
            found = list(encoding.offsets)
            spans.append(found if len(found) <= max_tokens else found[:keep] + [(0, 0)] * len(self.suffix))
        return spans

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special_tokens: bool = False) -> str:
        """Text of `ids`, for people to read."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that carry no text of their own, ascending."""
        return tuple(sorted(set(self.special_tokens.values())))

    @property
    def weightless_ids(self) -> tuple[int, ...]:
        """Ids without lexical weight, ascending: all special ones but the mask, as the model reads them from
        its folder (`read_special_ids`)."""
        return tuple(sorted({i for role, i in self.special_tokens.items() if role != "mask"}))

    def to_json(self) -> str:
        """All of it as one string; `from_json` gives an equal tokenizer in another process."""
        return json.dumps({"backend": self._backend.to_str(), "special_tokens": self.special_tokens})

    @staticmethod
    def from_json(text: str) -> Tokenizer:
        """The inverse of `to_json`."""
        parts = json.loads(text)
        return Tokenizer(tokenizers.Tokenizer.from_str(parts["backend"]), parts["special_tokens"])


def _by_characters(texts: Sequence[str]) -> Iterator[list[str]]:
    """`texts` in groups of at most CHARACTERS_PER_CALL characters, or of one longer text."""
    group: list[str] = []
    held = 0
    for text in texts:
        if group and held + len(text) > CHARACTERS_PER_CALL:
            yield group
            group, held = [], 0
        group.append(text)
        held += len(text)
    if group:
        yield group


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """Read the tokenizer of a Hugging Face folder and check it against the model's vocabulary.

    Args:
        path: the folder; nothing is downloaded.
        vocab_size: rows of the model's embedding matrix; None skips the check.

    Raises:
        ConfigError: no folder, no readable tokenizer in it, or a vocabulary that is not the model's.
    """
    # importing it costs two seconds that worker processes, which get the tokenizer as JSON, must not pay
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise ConfigError(
            "model.path", str(path), "is not a folder", "give the path of a Hugging Face model folder"
        )
    try:
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        backend = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except (OSError, ValueError, KeyError, AttributeError, ImportError, TypeError, RuntimeError) as error:
        remedy = "put tokenizer.json, or sentencepiece.bpe.model with tokenizer_config.json, into the folder"
        raise ConfigError(
            "model.path",
            str(path),
            f"holds no tokenizer that can be read ({str(error).partition(chr(10))[0]})",
            remedy,
        ) from error
    special = {
        role: getattr(loaded, f"{role}_token_id", None)
        for role in ("cls", "sep", "pad", "unk", "mask", "bos", "eos")
    }
    tokenizer = Tokenizer(
        backend, {role: int(token_id) for role, token_id in special.items() if token_id is not None}
    )
    if vocab_size is not None:
        check_vocabulary(tokenizer, vocab_size, path)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, path: str | Path) -> None:
    """Refuse a tokenizer whose ids do not fill the model's `vocab_size` embedding rows.

    Raises:
        ConfigError: an id without a row, or far fewer ids than rows (transformers falls back to a vocabulary
            of five tokens when it finds a SentencePiece file under an unexpected name).
    """
    unused = vocab_size - tokenizer.vocab_size
    if 0 <= unused <= max(MAX_UNUSED_ROWS, int(MAX_UNUSED_SHARE * tokenizer.vocab_size)):
        return
    rule = f"the tokenizer has {tokenizer.vocab_size} tokens, the model's embedding {vocab_size} rows"
    raise ConfigError("model.path", str(path), rule, "use the tokenizer the encoder was trained with")
