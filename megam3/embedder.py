"""Text in, representations out: the trained model for inference.

    embedder = M3Embedder("runs/demo/export")
    encoded = embedder.encode(["what is a heading?", "A heading names a section."])
    embedder.encode("what is a heading?", heads=["dense"], dense_dim=256).dense_vecs   # one text
    embedder.score([("what is a heading?", "A heading names a section.")])["sum"]

Texts are sorted by length and packed up to a token budget; results come back in the order given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import tokenizers
import torch
from rich.console import Console
from rich.progress import Progress
from transformers import PreTrainedTokenizerBase

from megam3.batch import Representations, pack_texts
from megam3.config.objective import HEADS, HeadWeights
from megam3.config.schema import ModelConfig
from megam3.data.tokenizer import Tokenizer
from megam3.errors import ConfigError, DataError
from megam3.model.backbone import max_text_tokens
from megam3.model.encoded import (
    Encoded,
    lexical_dicts,
    lexical_match,
    multi_vector_arrays,
    truncate_dense,
)
from megam3.model.folder import model_folder, pick_device
from megam3.model.m3 import M3Model, represent
from megam3.model.pretrained import load_m3, load_tokenizer_of

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PAIRS_AT_ONCE = 1024
_TEXTS_PER_CALL = 1024
"""Texts that go to the tokenizer in one call, which uses all cores; what it returns beside ids is dropped."""


class M3Embedder:
    """An M3 model and its tokenizer, without gradients.

    Args:
        path: a folder in the published layout (encoder, tokenizer, both heads), or the id of one on the hub.
        device: None: CUDA when there is one.
        precision: auto: bf16 on CUDA, fp32 elsewhere.

    Raises:
        ConfigError, CheckpointError: the folder cannot be served, or the device is not there.
    """

    def __init__(self, path: str, *, device: str | torch.device | None = None, precision: Precision = "auto"):
        target = pick_device(device)
        if precision == "auto":
            precision = "bf16" if target.type == "cuda" else "fp32"
        if precision not in _DTYPES:
            raise ConfigError(
                "precision", precision, f"must be auto or one of {', '.join(_DTYPES)}", "leave it at auto"
            )
        path = model_folder(path)
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
        # what training data is prepared with; a copy, because limits set on the original would change it
        backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._text_tokenizer = Tokenizer(backend, {})

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.encoder.parameters()).device

    def to(self, device: str | torch.device) -> M3Embedder:
        """Move the model; returns itself."""
        self.model.to(pick_device(device))
        return self

    def token_arrays(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[np.ndarray]:
        """int32 ids of each text, special tokens included, cut at `max_tokens` (None: what the model takes).

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
        arrays: list[np.ndarray] = []
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            arrays += self._text_tokenizer.encode(texts[start : start + _TEXTS_PER_CALL], limit)[0]
        return arrays

    def token_ids(self, texts: Sequence[str], *, max_tokens: int | None = None) -> list[list[int]]:
        """As `token_arrays`, as lists."""
        return [ids.tolist() for ids in self.token_arrays(texts, max_tokens=max_tokens)]

    def represent_ids(
        self, token_ids: Sequence[Sequence[int] | np.ndarray], *, batch_tokens: int = 32768
    ) -> Iterator[tuple[list[int], Representations]]:
        """Batches of (positions in `token_ids`, Representations on the device), see `length_batches`."""
        was_training = self.model.training
        self.model.eval()
        try:
            for indices in length_batches([len(ids) for ids in token_ids], batch_tokens):
                texts = pack_texts([token_ids[i] for i in indices]).to(self.device)  # type: ignore[misc]
                # entered per batch: between two batches the caller's code runs, under its own gradient mode
                with torch.no_grad():
                    representations = represent(self.model, texts)
                yield indices, representations
        finally:
            self.model.train(was_training)

    def encode(
        self,
        texts: str | Sequence[str],
        *,
        heads: Sequence[str] = HEADS,
        max_tokens: int | None = None,
        batch_tokens: int = 32768,
        dense_dim: int | None = None,
        normalize: bool = True,
        output: Literal["numpy", "torch"] = "numpy",
        device: str | torch.device | None = None,
        show_progress: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Encoded:
        """Representations of one text or of many, on the host.

        Args:
            texts: a list of texts; or one text, which gives its single entries instead of lists of one.
            heads: which of dense, lexical and multi_vector to bring back; the others are None in the result.
            max_tokens: longer texts are cut; None: as many as the model takes.
            batch_tokens: tokens encoded at a time.
            dense_dim: keep this many dimensions of the dense vector (of models trained for it: Matryoshka).
            normalize: scale a shortened dense vector to length 1 again; whole ones have length 1 anyway.
            output: kind of the arrays.
            device: move the model there first.
            show_progress: a bar on stderr.
            progress: called with the number of texts each batch finished.

        Raises:
            ConfigError: an unknown head or output, or a limit or dimension the model does not have.
            DataError: something that is not a string.
        """
        if isinstance(texts, str):
            options: dict[str, Any] = {
                "max_tokens": max_tokens,
                "batch_tokens": batch_tokens,
                "device": device,
            }
            return self.encode(
                [texts], heads=heads, dense_dim=dense_dim, normalize=normalize, output=output, **options
            ).first()
        self._check_output(heads, dense_dim, output)
        if device is not None:
            self.to(device)
        dense = np.zeros((len(texts), self.model.encoder.config.hidden_size), dtype=np.float32)
        lexical: list[dict[str, float]] = [{} for _ in texts]
        multi: list[np.ndarray] = [np.zeros((0, 0), dtype=np.float32) for _ in texts]
        token_ids = self.token_arrays(texts, max_tokens=max_tokens)
        with _reporting(len(texts), show_progress, progress) as report:
            for indices, batch in self.represent_ids(token_ids, batch_tokens=batch_tokens):
                if "dense" in heads:
                    dense[indices] = batch.dense_ND.float().cpu().numpy()
                if "lexical" in heads:
                    for index, weights in zip(indices, lexical_dicts(batch)):
                        lexical[index] = weights
                if "multi_vector" in heads:
                    for index, vectors in zip(indices, multi_vector_arrays(batch)):
                        multi[index] = vectors
                report(len(indices))
        convert: Callable[[np.ndarray], Any] = torch.from_numpy if output == "torch" else np.asarray
        return Encoded(
            convert(truncate_dense(dense, dense_dim, normalize)) if "dense" in heads else None,
            lexical if "lexical" in heads else None,
            [convert(rows) for rows in multi] if "multi_vector" in heads else None,
        )

    def _check_output(self, heads: Sequence[str], dense_dim: int | None, output: str) -> None:
        for head in [heads] if isinstance(heads, str) else heads:
            if isinstance(heads, str) or head not in HEADS:
                raise ConfigError(
                    "heads", heads, f"must be a list of {', '.join(HEADS)}", "check the spelling"
                )
        width = self.model.encoder.config.hidden_size
        if dense_dim is not None and not 0 < dense_dim <= width:
            raise ConfigError(
                "dense_dim", dense_dim, f"must be between 1 and the model's {width}", "lower it"
            )
        if output not in ("numpy", "torch"):
            raise ConfigError("output", output, "must be numpy or torch", "leave it at numpy")

    def score(
        self,
        pairs: Sequence[tuple[str, str]] | tuple[str, str],
        *,
        weights: HeadWeights | None = None,
        max_tokens: int | None = None,
        batch_tokens: int = 32768,
    ) -> dict[str, Any]:
        """Scores of (query, passage) pairs: `dense`, `lexical`, `multi_vector` and `sum`, each float32 [n].

        `multi_vector` is a mean over query tokens; `sum` weighs them 1 / 0.3 / 1, unless weights are
        given (arXiv 2402.03216, section 4). One pair of strings gives one number for each name.

        Raises:
            DataError: something that is not a pair of strings.
        """
        if len(pairs) == 2 and all(isinstance(text, str) for text in pairs) and not isinstance(pairs, str):
            one = self.score([pairs], weights=weights, max_tokens=max_tokens, batch_tokens=batch_tokens)  # type: ignore[list-item]
            return {name: float(values[0]) for name, values in one.items()}
        _check_pairs(pairs)
        weights = weights or HeadWeights(dense=1.0, lexical=0.3, multi_vector=1.0)
        scores = {head: np.zeros(len(pairs), dtype=np.float32) for head in HEADS}
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
    """Positions of texts, longest first, in batches of at most `batch_tokens`; a longer one goes alone.

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


def _check_pairs(pairs: Sequence[Any]) -> None:
    remedy = "pass a list of (query, passage), or one such pair"
    if isinstance(pairs, str):
        raise DataError("pairs", pairs, "is one text, not a pair of texts", remedy)
    for index, pair in enumerate(pairs):
        # a string of two letters would pass as a pair of texts
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(f"pairs[{index}]", pair, "is not a pair of strings", remedy)


@contextmanager
def _reporting(
    total: int, show: bool, progress: Callable[[int], None] | None
) -> Iterator[Callable[[int], None]]:
    """A function that takes the number of texts just finished; draws a bar on stderr if `show`."""
    with Progress(console=Console(file=sys.stderr), disable=not show) as bar:
        task = bar.add_task("encoding", total=total)

        def report(count: int) -> None:
            bar.advance(task, count)
            if progress is not None:
                progress(count)

        yield report
