"""Model folders with random weights in the published layout: encoder, both heads, and a tokenizer whose words
are `t5`, `t6`, …

Every side loads the same folder, so all start from the same weights. Dropout is 0: losses can be compared,
and no side pays for masks.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import XLMRobertaConfig, XLMRobertaModel

from benchmarks.texts import NUM_SPECIAL_IDS

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
assert len(SPECIAL_TOKENS) == NUM_SPECIAL_IDS


@dataclass(frozen=True)
class ModelSize:
    """An XLM-R; `max_tokens` without the two rows before position 0."""

    vocab_size: int
    num_layers: int
    hidden_size: int
    max_tokens: int = 512

    @property
    def name(self) -> str:
        """Folder name."""
        return f"v{self.vocab_size}-l{self.num_layers}-h{self.hidden_size}-t{self.max_tokens}"

    @property
    def label(self) -> str:
        """For tables."""
        vocabulary = f"{self.vocab_size:_}".replace("_", " ")
        return f"{self.num_layers} layers × {self.hidden_size}, vocabulary {vocabulary}"

    def config(self) -> XLMRobertaConfig:
        """XLM-R's special ids, offset and epsilon; attention heads of width 64 as in every published size."""
        return XLMRobertaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=max(1, self.hidden_size // 64),
            intermediate_size=4 * self.hidden_size,
            max_position_embeddings=self.max_tokens + 2,
            type_vocab_size=1,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
            layer_norm_eps=1e-5,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )


def make_model_folder(root: Path, size: ModelSize) -> Path:
    """The folder of this size under `root`, made when it is not there yet; the last file written marks it
    complete."""
    folder = root / size.name
    if (folder / "complete").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    XLMRobertaModel(size.config()).save_pretrained(folder)
    hidden = size.hidden_size
    torch.save(
        {"weight": torch.randn(hidden, hidden) / hidden**0.5, "bias": torch.randn(hidden) * 0.1},
        folder / "colbert_linear.pt",
    )
    torch.save(
        {"weight": torch.randn(1, hidden) * 0.02, "bias": torch.full((1,), 0.3)}, folder / "sparse_linear.pt"
    )
    write_tokenizer(folder, size)
    (folder / "complete").touch()
    return folder


def write_tokenizer(folder: Path, size: ModelSize) -> None:
    """A word-level tokenizer of exactly the vocabulary's size, in files that transformers 4 and 5 both
    read."""
    words = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    words |= {f"t{index}": index for index in range(NUM_SPECIAL_IDS, size.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {
        "bos": "<s>",
        "cls": "<s>",
        "eos": "</s>",
        "sep": "</s>",
        "pad": "<pad>",
        "unk": "<unk>",
        "mask": "<mask>",
    }
    config = {f"{role}_token": token for role, token in roles.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": size.max_tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
