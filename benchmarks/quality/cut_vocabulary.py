"""A copy of an encoder whose vocabulary holds only the pieces that occur in some files.

    python -m benchmarks.quality.cut_vocabulary ENCODER OUT FILE.jsonl [FILE.jsonl …]

A multilingual encoder of 384 columns keeps 82 % of its parameters in the 250 002 rows of its embedding. On a
small experiment's texts most rows never get a gradient, but the optimizer still reads and writes each of them
in every step. Rows that occur nowhere are taken out; every text keeps its tokens, and so its outputs, bit for
bit (checked on each text before the folder is written).
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from safetensors.torch import load_file, save_file

WORDS = "embeddings.word_embeddings.weight"
NUM_FIRST = 4  # <s>, <pad>, </s>, <unk>: XLM-R's first rows; <mask> is its last


def texts_of(paths: Sequence[str]) -> list[str]:
    """Every string of every record, once: queries, passages, titles, texts."""
    found: dict[str, None] = {}  # several questions share a passage
    for path in paths:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                for value in json.loads(line).values():
                    texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
                    found.update(dict.fromkeys(texts))
    return list(found)


def used_ids(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> list[int]:
    """Ids that occur, ascending, with the special ones."""
    last = tokenizer.get_vocab_size() - 1
    found = {*range(NUM_FIRST), last}
    block: list[str] = []
    for text in texts:
        block.append(text)
        if len(block) == 1024:
            found.update(i for each in tokenizer.encode_batch_fast(block) for i in each.ids)
            block = []
    found.update(i for each in tokenizer.encode_batch_fast(block) for i in each.ids)
    return sorted(found)


def cut_tokenizer(path: Path, keep: Sequence[int]) -> dict:
    """tokenizer.json with the pieces of `keep` in their order.

    The lowest score of all pieces decides what an unknown character costs, so its piece must be in `keep` or
    the cost rises; `main` checks the outcome rather than the reason.
    """
    data = json.loads(path.read_text(encoding="utf-8"))
    number = {old: new for new, old in enumerate(keep)}
    vocabulary = data["model"]["vocab"]
    data["model"]["vocab"] = [vocabulary[old] for old in keep if old < len(vocabulary)]
    for added in data["added_tokens"]:
        added["id"] = number[added["id"]]
    return data


def main(argv: Sequence[str] | None = None) -> int:
    """Write OUT, unless some text would be split otherwise."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("encoder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("files", nargs="+")
    given = parser.parse_args(argv)
    whole = tokenizers.Tokenizer.from_file(str(given.encoder / "tokenizer.json"))
    whole.no_truncation()
    texts = texts_of(given.files)
    keep = used_ids(whole, texts)
    given.out.mkdir(parents=True)
    for source in given.encoder.iterdir():
        if source.name not in ("model.safetensors", "tokenizer.json", "sentencepiece.bpe.model"):
            shutil.copy(source, given.out)
    tokenizer_file = given.out / "tokenizer.json"
    tokenizer_file.write_text(
        json.dumps(cut_tokenizer(given.encoder / "tokenizer.json", keep), ensure_ascii=False),
        encoding="utf-8",
    )
    small = tokenizers.Tokenizer.from_file(str(tokenizer_file))
    small.no_truncation()
    for text in texts:
        if whole.encode(text).tokens != small.encode(text).tokens:
            raise SystemExit(f"would be split otherwise: {text[:200]}")
    weights = load_file(given.encoder / "model.safetensors")
    weights[WORDS] = weights[WORDS][keep].contiguous()
    save_file(weights, given.out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((given.encoder / "config.json").read_text())
    config["vocab_size"] = len(keep)
    (given.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{given.out}: {len(keep)} of {whole.get_vocab_size()} pieces")
    return 0


if __name__ == "__main__":
    sys.exit(main())
