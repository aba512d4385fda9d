"""One call for every format: `export(state, source, out, format=…)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from megam3.errors import ConfigError
from megam3.export.bge_m3 import export_bge_m3
from megam3.export.mlm import export_mlm
from megam3.export.model_card import NO_FACTS, CardFacts
from megam3.export.multi_vector import write_multi_vector
from megam3.export.onnx import export_onnx
from megam3.export.pylate import write_pylate
from megam3.export.sparse import refuse_sparse
from megam3.export.token_vectors import reload_token_vectors
from megam3.export.verify import model_from_state, refuse_existing, verify_folder
from megam3.files import atomic_folder

Format = Literal["bge-m3", "multi-vector", "pylate", "sparse", "mlm", "onnx"]
FORMATS: tuple[str, ...] = get_args(Format)


def export(
    state: Mapping[str, Tensor],
    source: str,
    out: str | Path,
    *,
    format: str = "bge-m3",
    int8: bool = False,
    facts: CardFacts = NO_FACTS,
) -> dict[str, float]:
    """Write the weights `state` as folder `out`, read it back, and return the largest difference per head.

    Args:
        state: keys of an M3Model (`mlm`: of a pretraining model).
        source: the folder training began from; gives config, tokenizer and pooler.
        int8: with `onnx`, a dynamically quantised graph beside the exact one.
        facts: what the model card says of the run.

    Raises:
        ConfigError: an unknown or impossible format, or a package it needs is missing.
        CheckpointError: `out` exists, the weights do not fit, or the folder differs; no folder stays behind.
    """
    if format not in FORMATS:
        raise ConfigError("format", format, "is no export format", f"use one of: {', '.join(FORMATS)}")
    if int8 and format != "onnx":
        raise ConfigError("int8", True, f"{format} holds fp32 weights", "use it with --format onnx")
    if format == "sparse":
        raise refuse_sparse()
    if format == "bge-m3":
        return export_bge_m3(state, source, out, facts)
    if format == "mlm":
        return export_mlm(state, source, out)
    if format == "onnx":
        return export_onnx(state, source, out, int8=int8)
    write = write_multi_vector if format == "multi-vector" else write_pylate
    out = refuse_existing(out)
    model = model_from_state(state, source)
    with atomic_folder(out) as aside:
        write(aside, model, Path(source), facts)
        return verify_folder(aside, model, source, reload_token_vectors)
