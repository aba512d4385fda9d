"""An exported folder as a model of MTEB (2 or later): `mteb.evaluate(MtebModel("runs/demo/export"), tasks)`.

The dense head only: MTEB compares one vector a text. The package mteb is not imported before an object is
made.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megam3 import __version__
from megam3.embedder import M3Embedder
from megam3.errors import ConfigError


class MtebModel:
    """MTEB's encoder protocol around an M3Embedder.

    Args:
        path: a folder in the published layout.
        name: what MTEB files the results under, `owner/name`.
        batch_tokens: tokens per encoding batch, None: what suits the device; MTEB's own batch size counts
            texts and is not used.

    Raises:
        ConfigError: mteb is not installed.
        ConfigError, CheckpointError: the folder cannot be served.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str = "megam3/local",
        device: str | None = None,
        batch_tokens: int | None = None,
    ):
        try:
            mteb_models = importlib.import_module("mteb.models")
        except ImportError:
            remedy = "pip install 'mteb>=2'"
            raise ConfigError("mteb", path, "the package mteb is not installed", remedy) from None
        self.embedder = M3Embedder(path, device=device)
        self.batch_tokens = batch_tokens
        self.mteb_model_meta = mteb_models.ModelMeta.create_empty(
            {
                "name": name,
                "revision": __version__,
                "max_tokens": self.embedder.max_tokens,
                "embed_dim": self.embedder.model.encoder.config.hidden_size,
            }
        )

    def encode(
        self, inputs: Iterable[dict[str, Any]], *, prompt_type: str | None = None, **_: Any
    ) -> np.ndarray:
        """float32 [n, D] of the texts in MTEB's batches. By `prompt_type` (`query`, `document`, or None where
        texts are alike) the folder's instruction stands before each; the task changes nothing."""
        texts = [text for batch in inputs for text in batch["text"]]
        encode = {"query": self.embedder.encode_queries, "document": self.embedder.encode_passages}.get(
            str(getattr(prompt_type, "value", prompt_type)), self.embedder.encode
        )
        return encode(texts, batch_tokens=self.batch_tokens).dense_vecs

    def similarity(self, first: Any, second: Any) -> Tensor:
        """[n, m]: inner products, which are cosines here."""
        return _rows(first) @ _rows(second).T

    def similarity_pairwise(self, first: Any, second: Any) -> Tensor:
        """[n]: inner products of rows with the same number."""
        return (_rows(first) * _rows(second)).sum(dim=-1)


def _rows(vectors: Any) -> Tensor:
    rows = torch.as_tensor(np.asarray(vectors), dtype=torch.float32)
    return rows if rows.ndim == 2 else rows.unsqueeze(0)
