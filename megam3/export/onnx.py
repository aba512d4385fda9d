"""model.onnx: one padded forward pass with three outputs, for onnxruntime.

    input_ids, attention_mask  int64 [N, L]
    dense          [N, D]     normalised
    token_weights  [N, L]     relu of the lexical head, 0 for special and padding tokens; a text's weight of
    an id is
                              the maximum over its occurrences
    multi_vectors  [N, L, C]  normalised rows; row 0 (`<s>`) and rows of padding are 0, leave them out

Needs the packages onnx and onnxscript to write, onnxruntime to check and to quantise.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel

from megam3 import __version__
from megam3.config.schema import ModelConfig
from megam3.errors import CheckpointError, ConfigError
from megam3.export.tokenizer_files import write_tokenizer_files
from megam3.export.verify import (
    SAMPLE_TEXTS,
    model_from_state,
    refuse_existing,
    refuse_mcls,
    verify_tokenizer,
)
from megam3.files import atomic_folder, write_json
from megam3.model.m3 import M3Model, max_model_tokens, represent
from megam3.model.pretrained import load_tokenizer_of
from megam3.packed_texts import pack_texts

ONNX_TOLERANCE = 1e-4
"""Largest difference of any number in fp32; other kernels sum in another order. int8 is reported, not
judged."""
OUTPUTS = ("dense", "token_weights", "multi_vectors")
_OPSET = 18


class PaddedM3(nn.Module):
    """The model on padded tensors, as graph exporters need it."""

    def __init__(self, model: M3Model, source: str):
        super().__init__()
        config = copy.deepcopy(model.encoder.config)
        self.encoder = AutoModel.from_config(
            config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
        )
        self.encoder.load_state_dict(model.encoder.state_dict(), strict=False)
        self.lexical_head, self.multi_vector_head = model.lexical_head, model.multi_vector_head
        self.special_ids, self.pooling, self.first_id = (
            model.special_ids,
            model.reading.pooling,
            model.first_id,
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the module's docstring."""
        assert self.lexical_head is not None
        assert self.multi_vector_head is not None
        hidden_NLD = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        is_text = attention_mask > 0
        dense_ND = nn.functional.normalize(self._pool(hidden_NLD, attention_mask), dim=-1)
        counts = is_text
        for special in self.special_ids:
            counts = counts & (input_ids != special)
        weights_NL = torch.relu(self.lexical_head(hidden_NLD)).squeeze(-1) * counts.to(hidden_NLD.dtype)
        rows_NLC = nn.functional.normalize(self.multi_vector_head(hidden_NLD), dim=-1)
        kept_NL = is_text
        if self.first_id is not None:
            kept_NL = is_text & (torch.arange(input_ids.shape[1], device=input_ids.device) > 0)
        return dense_ND, weights_NL, rows_NLC * kept_NL.unsqueeze(-1).to(hidden_NLD.dtype)

    def _pool(self, hidden_NLD: Tensor, mask_NL: Tensor) -> Tensor:
        """The row of each text that its dense vector is made of; texts are padded on the right."""
        if self.pooling == "mean":
            weights_NL1 = mask_NL.to(hidden_NLD.dtype).unsqueeze(-1)
            return (hidden_NLD * weights_NL1).sum(1) / weights_NL1.sum(1)
        if self.pooling == "last":
            last_N11 = (mask_NL.sum(1) - 1).reshape(-1, 1, 1).expand(-1, 1, hidden_NLD.shape[2])
            return hidden_NLD.gather(1, last_N11).squeeze(1)
        return hidden_NLD[:, 0]


def export_onnx(
    state: Mapping[str, Tensor],
    source: str,
    out: str | Path,
    *,
    int8: bool = False,
    settings: ModelConfig | None = None,
) -> dict[str, float]:
    """Write model.onnx (and model.int8.onnx), the tokenizer and megam3_config.json as folder `out`.

    Returns:
        Largest difference per output between onnxruntime and the packed model, `int8/NAME` for the quantised
        one.

    Raises:
        ConfigError: a package is missing.
        CheckpointError: `out` exists, a head is missing, or onnxruntime computes something else.
    """
    out = refuse_existing(out)
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _import(name)
    model = model_from_state(state, source, settings)
    refuse_mcls(model, "onnx")
    if model.lexical_head is None or model.multi_vector_head is None:
        rule = "the graph has three outputs, and a head is missing"
        raise CheckpointError("export", ", ".join(model.heads), rule, "export it as bge-m3")
    max_tokens = min(max_model_tokens(model), load_tokenizer_of(source).model_max_length)
    with atomic_folder(out) as aside:
        write_tokenizer_files(Path(source), aside, max_tokens)
        own = {
            "megam3_version": __version__,
            "max_tokens": max_tokens,
            "special_ids": list(model.special_ids),
            "outputs": list(OUTPUTS),
            "pooling": model.reading.pooling,
        }
        write_json(aside / "megam3_config.json", own)
        _write_graph(PaddedM3(model, source).eval(), aside / "model.onnx")
        verify_tokenizer(aside, source)
        differences = onnx_differences(aside / "model.onnx", model, source)
        if int8:
            quantization = importlib.import_module("onnxruntime.quantization")
            quantization.quantize_dynamic(aside / "model.onnx", aside / "model.int8.onnx")
            quantised = onnx_differences(aside / "model.int8.onnx", model, source)
            differences |= {f"int8/{name}": value for name, value in quantised.items()}
        for name in OUTPUTS:
            if not differences[name] <= ONNX_TOLERANCE:
                rule = f"largest difference of {name} must be at most {ONNX_TOLERANCE}"
                raise CheckpointError("export", differences[name], rule, "nothing was written")
    return differences


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        remedy = "pip install onnx onnxscript onnxruntime"
        raise ConfigError("format", "onnx", f"the package {name} is not installed", remedy) from None


def _write_graph(padded: PaddedM3, file: Path) -> None:
    ids = torch.tensor([[0, 5, 6, 7, 2], [0, 8, 2, 1, 1], [0, 9, 4, 2, 1]])
    batch, length = torch.export.Dim("batch", min=1), torch.export.Dim("length", min=2)
    shape = {0: batch, 1: length}
    torch.onnx.export(
        padded,
        (ids, (ids != 1).long()),
        str(file),
        dynamo=True,
        external_data=False,
        opset_version=_OPSET,
        input_names=["input_ids", "attention_mask"],
        output_names=list(OUTPUTS),
        dynamic_shapes={"input_ids": shape, "attention_mask": shape},
        verbose=False,
    )


@torch.no_grad()
def onnx_differences(file: Path, model: M3Model, source: str) -> dict[str, float]:
    """Largest absolute difference per output between onnxruntime on padded texts and the packed model."""
    runtime = importlib.import_module("onnxruntime")
    tokenizer = load_tokenizer_of(source)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found = dict.fromkeys(OUTPUTS, 0.0)
    limit = min(256, tokenizer.model_max_length)
    # two shapes: a graph whose axes were fixed by the example would fail on one of them
    for texts in (list(SAMPLE_TEXTS), list(SAMPLE_TEXTS[:1])):
        padded = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="np")
        feed = {name: padded[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
        dense, weights, rows = session.run(list(OUTPUTS), feed)
        lengths = feed["attention_mask"].sum(axis=1)
        ids = [line[:n].tolist() for line, n in zip(feed["input_ids"], lengths)]
        wanted = represent(model, pack_texts(ids))
        found["dense"] = max(found["dense"], _difference(dense, wanted.dense_ND))
        first = 0 if model.first_id is None else 1
        kept = np.concatenate([line[first:n] for line, n in zip(rows, lengths)])
        found["multi_vectors"] = max(found["multi_vectors"], _difference(kept, wanted.multi_KC))
        pooled = [_pool(line, of_line, model.special_ids) for line, of_line in zip(weights, ids)]
        flat = np.array([value for text in pooled for _, value in sorted(text.items())], dtype=np.float32)
        found["token_weights"] = max(found["token_weights"], _difference(flat, wanted.lexical_weights_Z))
    return found


def _pool(weights: np.ndarray, ids: list[int], special_ids: tuple[int, ...]) -> dict[int, float]:
    pooled: dict[int, float] = {}
    for token, weight in zip(ids, weights):
        if token not in special_ids:
            pooled[token] = max(pooled.get(token, 0.0), float(weight))
    return pooled


def _difference(got: np.ndarray, wanted: Tensor) -> float:
    expected = wanted.float().numpy()
    if got.shape != expected.shape:
        return float("inf")
    return float(np.abs(got - expected).max())
