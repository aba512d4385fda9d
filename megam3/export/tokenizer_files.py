"""Tokenizer files that both transformers 4 and 5 read.

transformers 5 writes keys into tokenizer_config.json that 4.x stumbles over (`extra_special_tokens` as a list
is an AttributeError there).
So files are copied from the source and cleaned, never re-saved.
"""

import json
import os
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from megam3.model_files import read_model_object, refuse_links_out

_COPIED = (
    "tokenizer.json",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_WRITTEN_BY_V5_ONLY = ("backend", "is_local", "local_files_only")


def write_tokenizer_files(source: Path, out: Path, max_tokens: int) -> None:
    """The tokenizer of folder `source` into folder `out`, with `model_max_length` set to `max_tokens`."""
    refuse_links_out(source)
    config, special_tokens = (
        _read_json(source / name) for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    for name in _COPIED:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if not (out / "tokenizer.json").exists() and tokenizer.is_fast:
        tokenizer.backend_tokenizer.save(os.fspath(out / "tokenizer.json"))
    config = {key: value for key, value in config.items() if key not in _WRITTEN_BY_V5_ONLY}
    if isinstance(config.get("extra_special_tokens"), list):
        del config["extra_special_tokens"]
    # transformers 5 names generic fast tokenizers TokenizersBackend, a class 4.x does not have
    if config.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    special = {name: token for name in _SPECIAL_TOKENS if (token := getattr(tokenizer, name)) is not None}
    config = {**special, **config, "model_max_length": max_tokens}
    _write_json(out / "tokenizer_config.json", config)
    _write_json(out / "special_tokens_map.json", special_tokens or special)


def _read_json(file: Path) -> dict:
    return read_model_object(file) if file.exists() else {}


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
