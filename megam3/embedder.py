"""Text in, representations out: the trained model for inference.

    embedder = M3Embedder("runs/demo/export")
    encoded = embedder.encode(["what is a heading?", "A heading names a section."])
    embedder.score([("what is a heading?", "A heading names a section.")])["sum"]

Texts are sorted by length and packed up to a token budget; results come back in the order given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from megam3.batch import Representations, pack_texts
from megam3.config.schema import HeadWeights, ModelConfig
from megam3.errors import ConfigError, DataError
from megam3.model.backbone import max_text_tokens
from megam3.model.m3 import M3Model, represent
from megam3.model.pretrained import load_m3, load_tokenizer_of

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PAIRS_AT_ONCE = 1024


@dataclass(frozen=True)
class Encoded:
    """What `encode` returns for n texts, in the form FlagEmbedding's users know."""

    dense_vecs: np.ndarray
    """float32 [n, D], L2-normalised."""
    lexical_weights: list[dict[str, float]]
    """Per text {token id as a string: weight}, weights above zero only."""
    colbert_vecs: list[np.ndarray]
    """Per text float32 [tokens - 1, C], rows L2-normalised, `<s>` left out."""


class M3Embedder:
    """An M3 model and its tokenizer, without gradients.

    Args:
        path: a folder in the published layout (encoder, tokenizer, both heads).
        device: None: CUDA when there is one.
        precision: auto: bf16 on CUDA, fp32 elsewhere.

    Raises:
        ConfigError, CheckpointError: the folder cannot be served.
    """

    def __init__(self, path: str, *, device: str | torch.device | None = None, precision: Precision = "auto"):
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if precision == "auto":
            precision = "bf16" if target.type == "cuda" else "fp32"
        if precision not in _DTYPES:
            raise ConfigError(
                "precision", precision, f"must be auto or one of {', '.join(_DTYPES)}", "leave it at auto"
            )
        path = str(path)
        model = load_m3(path, ModelConfig(path=path), dtype=_DTYPES[precision])
        self._take(model.to(target), load_tokenizer_of(path))

    @classmethod
    def from_model(cls, model: M3Model, tokenizer: PreTrainedTokenizerBase) -> M3Embedder:
        """Around a model that is in memory already (evaluation during training); the model is not copied."""
        embedder = cls.__new__(cls)
        embedder._take(model, tokenizer)
        return embedder

    def _take(self, model: M3Model, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_tokens = min(8192, max_text_tokens(model.encoder.config), tokenizer.model_max_length)
        """Longest text, special tokens included."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.lexical_head.weight.device

    def token_ids(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[list[int]]:
        """Ids of each text, special tokens included, cut at `max_tokens` (None: as many as the model takes).

        Raises:
            ConfigError: a limit the model has no positions for.
            DataError: something that is not a string.
        """
        limit = self.max_tokens if max_tokens is None else max_tokens
        if not 2 < limit <= self.max_tokens:
            raise ConfigError(
                "max_tokens",
                limit,
                f"must be between 3 and {self.max_tokens}, what the model has positions for",
                "lower it",
            )
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"texts[{index}]", text, "is not a string", "pass a list of strings")
        if not texts:
            return []
        return self.tokenizer(list(texts), truncation=True, max_length=limit, return_attention_mask=False)[
            "input_ids"
        ]

    def represent_ids(
        self, token_ids: Sequence[Sequence[int]], *, batch_tokens: int = 32768
    ) -> Iterator[tuple[list[int], Representations]]:
        """Batches of (positions in `token_ids`, their Representations on the device), longest texts first, see `length_batches`."""
        was_training = self.model.training
        self.model.eval()
        try:
            for indices in length_batches([len(ids) for ids in token_ids], batch_tokens):
                texts = pack_texts([token_ids[i] for i in indices]).to(self.device)
                # entered per batch: between two batches the caller's code runs, under its own gradient mode
                with torch.no_grad():
                    representations = represent(self.model, texts)
                yield indices, representations
        finally:
            self.model.train(was_training)

    def encode(
        self,
        texts: Sequence[str],
        *,
        max_tokens: int | None = None,
        batch_tokens: int = 32768,
        progress: Callable[[int], None] | None = None,
    ) -> Encoded:
        """All three representations of each text, on the host; `progress` is called with the number of texts each batch finished."""
        dense = np.zeros((len(texts), self.model.encoder.config.hidden_size), dtype=np.float32)
        lexical: list[dict[str, float]] = [{} for _ in texts]
        multi: list[np.ndarray] = [np.zeros((0, 0), dtype=np.float32) for _ in texts]
        for indices, batch in self.represent_ids(
            self.token_ids(texts, max_tokens=max_tokens), batch_tokens=batch_tokens
        ):
            dense[indices] = batch.dense_ND.float().cpu().numpy()
            for index, weights, vectors in zip(indices, lexical_dicts(batch), multi_vector_arrays(batch)):
                lexical[index], multi[index] = weights, vectors
            if progress is not None:
                progress(len(indices))
        return Encoded(dense, lexical, multi)

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        weights: HeadWeights | None = None,
        max_tokens: int | None = None,
        batch_tokens: int = 32768,
    ) -> dict[str, np.ndarray]:
        """Scores of (query, passage) pairs: arrays `dense`, `lexical`, `multi_vector` (mean over query tokens) and `sum`, each [n] float32.

        `sum` is w_dense·dense + w_lexical·lexical + w_multi·multi_vector, weights 1 / 0.3 / 1 unless given (arXiv 2402.03216, section 4).
        """
        weights = weights or HeadWeights(dense=1.0, lexical=0.3, multi_vector=1.0)
        scores = {
            head: np.zeros(len(pairs), dtype=np.float32) for head in ("dense", "lexical", "multi_vector")
        }
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            block = pairs[start : start + _PAIRS_AT_ONCE]
            texts = list(dict.fromkeys(text for pair in block for text in pair))
            row = {text: i for i, text in enumerate(texts)}
            encoded = self.encode(texts, max_tokens=max_tokens, batch_tokens=batch_tokens)
            for i, (query, passage) in enumerate(block, start):
                q, p = row[query], row[passage]
                scores["dense"][i] = encoded.dense_vecs[q] @ encoded.dense_vecs[p]
                scores["lexical"][i] = lexical_match(encoded.lexical_weights[q], encoded.lexical_weights[p])
                scores["multi_vector"][i] = (
                    (encoded.colbert_vecs[q] @ encoded.colbert_vecs[p].T).max(axis=1).mean()
                )
        scores["sum"] = sum(getattr(weights, head) * values for head, values in scores.items()).astype(
            np.float32
        )
        return scores


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Positions of texts, longest first, in batches of at most `batch_tokens` tokens (a longer text goes alone).

    >>> list(length_batches([2, 9, 3, 4], 7))
    [[1], [3, 2], [0]]
    """
    batch: list[int] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and used + lengths[index] > batch_tokens:
            yield batch
            batch, used = [], 0
        batch.append(index)
        used += lengths[index]
    if batch:
        yield batch


def lexical_dicts(representations: Representations) -> list[dict[str, float]]:
    """Per text {token id as a string: weight}, weights above zero only."""
    ids = representations.lexical_ids_Z.tolist()
    weights = representations.lexical_weights_Z.float().tolist()
    offsets = representations.lexical_offsets_N1.tolist()
    return [
        {str(ids[z]): weights[z] for z in range(start, stop) if weights[z] > 0}
        for start, stop in zip(offsets, offsets[1:])
    ]


def multi_vector_arrays(representations: Representations) -> list[np.ndarray]:
    """Per text its multi-vector rows, float32 [tokens - 1, C]."""
    rows, offsets = representations.multi_KC.float().cpu().numpy(), representations.multi_offsets_N1.tolist()
    return [rows[start:stop].copy() for start, stop in zip(offsets, offsets[1:])]


def lexical_match(query: dict[str, float], passage: dict[str, float]) -> float:
    """Sum over shared ids of the product of their weights."""
    return sum(weight * passage[token] for token, weight in query.items() if token in passage)
