"""Tiny folders of every served family, in the layout of published ones: random weights, a tokenizer, no
heads.

make_family_folder(tmp_path, "qwen3")     3 layers x 32, its tokenizer puts nothing first and </s> last
"""

import json
import os
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer

from megam3.encoders import FAMILIES
from tests.factory import write_tiny_tokenizer
from tests.model.test_attention import tiny


def make_family_folder(folder: Path, family: str, *, max_tokens: int = 512) -> Path:
    """The encoder and tokenizer of `family` in `folder`, which is returned.

    Models made left to right get a tokenizer as Qwen's: no token before a text, one after it.
    """
    num_tokens = write_tiny_tokenizer(folder, max_tokens=max_tokens)
    config = tiny(family)
    config.vocab_size, config.initializer_range = num_tokens, 0.1
    config.max_position_embeddings = max_tokens + (2 if FAMILIES[family].positions_after_padding else 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
    if FAMILIES[family].direction_field:
        _end_token_only(folder)
    return folder


def _end_token_only(folder: Path) -> None:
    backend = AutoTokenizer.from_pretrained(folder).backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B", special_tokens=[("</s>", 2)]
    )
    backend.save(os.fspath(folder / "tokenizer.json"))
    (folder / "sentencepiece.bpe.model").unlink()
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {**special, "model_max_length": 512, "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
