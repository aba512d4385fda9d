"""Train a sentencepiece unigram tokenizer and save it in XLM-R's layout.

XLM-R ids: <s> 0, <pad> 1, </s> 2, <unk> 3, then sentencepiece's own pieces shifted by one (its ids 3, 4, …
become 4, 5, …), <mask> last. The folder holds `sentencepiece.bpe.model` (read by slow tokenizers),
`tokenizer.json` (by fast ones) and `tokenizer_config.json`.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

import sentencepiece as spm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from megam3.errors import DataError

FIRST_PIECE_ID = 4
"""First id that is not a special token."""
_SPECIAL_TOKENS = {
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}


def train_tokenizer(
    texts: Iterable[str],
    folder: str | Path,
    vocab_size: int = 16_000,
    max_tokens: int = 8192,
    num_threads: int | None = None,
) -> PreTrainedTokenizerBase:
    """Learn pieces from `texts`, save the tokenizer to `folder` and load it back.

    `vocab_size` counts sentencepiece's pieces; the tokenizer has two ids more (<pad>, <mask>). A small text
    gets a smaller vocabulary.

    Raises:
        DataError: the texts are too few for sentencepiece.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    model = io.BytesIO()
    try:
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9998,
            num_threads=num_threads or os.cpu_count() or 1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(
            "tokenizer text",
            f"{len(lines)} lines",
            f"sentencepiece cannot learn from it ({error})",
            "give more text",
        ) from None
    (folder / "sentencepiece.bpe.model").write_bytes(model.getvalue())
    config = {**_SPECIAL_TOKENS, "model_max_length": max_tokens, "tokenizer_class": "XLMRobertaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.save_pretrained(folder)  # adds tokenizer.json
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
