"""Bi-encoders as teachers: a megam3 folder by any of its heads, a sentence-transformers folder by its dense
vector.

Of sentence-transformers' modules those are read that most folders consist of: Transformer, Pooling (cls,
mean, last token) and Normalize. Any other is refused by name: leaving it out would give other scores without
a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from megam3.embedder import M3Embedder
from megam3.errors import CheckpointError, ConfigError
from megam3.files import read_json
from megam3.model.device import pick_device
from megam3.retrieval.teachers.base import Pair, num_positions, padded_batches

HEADS = ("dense", "lexical", "multi_vector", "sum")
_POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
}


class M3Teacher:
    """A megam3 folder by one of its heads, or by their sum with weights 1 / 0.3 / 1.

    Raises:
        ConfigError: an unknown head, or one that the folder does not hold.
    """

    def __init__(
        self,
        folder: str,
        head: str = "sum",
        *,
        device: str | None = None,
        max_tokens: int | None = None,
        batch_tokens: int = 16384,
    ):
        if head not in HEADS:
            raise ConfigError("--head", head, f"must be one of {', '.join(HEADS)}", "use sum")
        self.embedder = M3Embedder(folder, device=device)
        self.embedder.require_heads(HEADS[:-1] if head == "sum" else [head], "--head")
        self.head, self.max_tokens, self.batch_tokens = head, max_tokens, batch_tokens

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """float32 [n], in the order given."""
        options = {"max_tokens": self.max_tokens, "batch_tokens": self.batch_tokens}
        return self.embedder.score(list(pairs), **options)[self.head]  # type: ignore[arg-type]


class DenseTeacher:
    """A sentence-transformers folder: Transformer, Pooling, and Normalize or not.

    Raises:
        CheckpointError: unreadable, or with a module or a pooling that is not read here.
        ConfigError: a limit that the model has no positions for.
    """

    def __init__(
        self,
        folder: str,
        *,
        device: str | None = None,
        max_tokens: int | None = None,
        batch_tokens: int = 16384,
    ):
        self.device, self.batch_tokens = pick_device(device), batch_tokens
        self.pooling, self.normalize = _read_modules(Path(folder))
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
            model = AutoModel.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            rule = f"holds no encoder that transformers can load ({str(error).partition(chr(10))[0]})"
            raise CheckpointError("--model", folder, rule, "check the folder") from error
        self.model = model.to(self.device).eval()
        most = num_positions(model.config)
        own = min(_max_seq_length(Path(folder)), self.tokenizer.model_max_length, most)
        self.max_tokens = own if max_tokens is None else max_tokens
        if not 2 < self.max_tokens <= most:
            rule = f"must be between 3 and {most}, what the model has positions for"
            raise ConfigError("--max-tokens", self.max_tokens, rule, f"leave it out for {own}")

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """float32 [n], in the order given."""
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))
        row = {text: n for n, text in enumerate(texts)}
        vectors = self.encode(texts)
        products = [vectors[row[query]] @ vectors[row[passage]] for query, passage in pairs]
        return np.array(products, dtype=np.float32)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, D]."""
        vectors = np.zeros((len(texts), self.model.config.hidden_size), dtype=np.float32)
        if not texts:
            return vectors
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)
        for batch in padded_batches([len(ids) for ids in encoded["input_ids"]], self.batch_tokens):
            inputs = self.tokenizer.pad(
                {name: [values[n] for n in batch] for name, values in encoded.items()}, return_tensors="pt"
            ).to(self.device)
            hidden_NLD = self.model(**inputs).last_hidden_state.float()
            pooled_ND = _pool(hidden_NLD, inputs["attention_mask"], self.pooling)
            if self.normalize:
                pooled_ND = torch.nn.functional.normalize(pooled_ND, dim=-1)
            vectors[batch] = pooled_ND.cpu().numpy()
        return vectors


def _pool(hidden_NLD: Tensor, mask_NL: Tensor, pooling: str) -> Tensor:
    row_N = torch.arange(hidden_NLD.shape[0], device=hidden_NLD.device)
    if pooling == "mean":
        weights_NL1 = mask_NL.unsqueeze(-1).to(hidden_NLD.dtype)
        return (hidden_NLD * weights_NL1).sum(1) / weights_NL1.sum(1).clamp_min(1e-9)
    # padding may stand on either side: the first and the last place that the mask keeps
    if pooling == "cls":
        return hidden_NLD[row_N, mask_NL.argmax(dim=1)]
    places_NL = torch.arange(mask_NL.shape[1], device=mask_NL.device) * mask_NL
    return hidden_NLD[row_N, places_NL.argmax(dim=1)]


def _read_json(path: Path) -> dict | list:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        rule = f"cannot be read ({error})"
        raise CheckpointError("--model", str(path), rule, "fetch the folder again") from error


def _read_modules(folder: Path) -> tuple[str, bool]:
    """(pooling, whether vectors are normalised) from modules.json and the pooling's config."""
    pooling, normalize = "", False
    for module in _read_json(folder / "modules.json"):
        kind = str(module["type"]).rpartition(".")[2]
        if kind == "Pooling":
            pooling = _pooling_of(folder / module["path"] / "config.json")
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            rule = f"has a module {kind}, which is not read here"
            raise CheckpointError(
                "--model", str(folder), rule, "use a folder of Transformer, Pooling, Normalize"
            )
    if not pooling:
        rule = "has no Pooling module"
        raise CheckpointError("--model", str(folder), rule, "use a folder with dense vectors")
    return pooling, normalize


def _pooling_of(path: Path) -> str:
    """From the old keys (one flag a mode) or the new one (`pooling_mode`)."""
    config = _read_json(path)
    assert isinstance(config, dict)
    mode = config.get("pooling_mode") or [name for key, name in _POOLINGS.items() if config.get(key)] + [
        key
        for key, value in config.items()
        if key.startswith("pooling_mode_") and value and key not in _POOLINGS
    ]
    modes = [mode] if isinstance(mode, str) else list(mode)
    if len(modes) != 1 or modes[0] not in _POOLINGS.values():
        rule = f"pools by {modes}; known are {', '.join(_POOLINGS.values())}"
        raise CheckpointError("--model", str(path), rule, "use another teacher")
    return modes[0]


def _max_seq_length(folder: Path) -> int:
    path = folder / "sentence_bert_config.json"
    if not path.exists():
        return 512
    config = _read_json(path)
    assert isinstance(config, dict)
    return int(config.get("max_seq_length") or 512)
