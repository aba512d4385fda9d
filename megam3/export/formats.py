"""One call for every format: `export(state, source, out, format=…)`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from megam3.config.schema import ModelConfig
from megam3.errors import ConfigError
from megam3.export.bge_m3 import export_bge_m3
from megam3.export.mlm import export_mlm
from megam3.export.model_card import NO_FACTS, CardFacts
from megam3.export.multi_vector import write_multi_vector
from megam3.export.onnx import export_onnx
from megam3.export.pylate import write_pylate
from megam3.export.sparse import refuse_sparse
from megam3.export.splade import export_splade
from megam3.export.verify import (
    is_layered,
    model_from_state,
    refuse_existing,
    refuse_mcls,
    reload_heads,
    verify_folder,
)
from megam3.files import atomic_folder

Format = Literal["bge-m3", "multi-vector", "pylate", "sparse", "splade", "mlm", "onnx"]
FORMATS: tuple[str, ...] = get_args(Format)


def export(
    state: Mapping[str, Tensor],
    source: str,
    out: str | Path,
    *,
    format: str = "bge-m3",
    int8: bool = False,
    facts: CardFacts = NO_FACTS,
    settings: ModelConfig | None = None,
) -> dict[str, float]:
    """Write the weights `state` as folder `out`, read it back, and return the largest difference per head.

    Args:
        state: keys of an M3Model (`mlm`: of a pretraining model).
        source: the folder training began from; gives config, tokenizer and pooler.
        int8: with `onnx`, a dynamically quantised graph beside the exact one.
        facts: what the model card says of the run.
        settings: the run's section `model`, for pooling and direction; None: what `source` says of itself.

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
    if any(key.startswith("expansion_head.") for key in state) and format in ("bge-m3", "onnx"):
        rule = "has no place for an expansion head, which weighs the whole vocabulary"
        raise ConfigError("format", format, rule, "use --format splade")
    if is_layered(state) and format in ("bge-m3", "splade"):
        rule = (
            "holds the multi-vector head as one matrix (colbert_linear.pt), and this one is a chain of layers"
        )
        raise ConfigError("format", format, rule, "use --format pylate, which M3Embedder reads too")
    if format == "splade":
        return export_splade(state, source, out, facts, settings)
    if format == "bge-m3":
        return export_bge_m3(state, source, out, facts, settings)
    if format == "mlm":
        return export_mlm(state, source, out)
    if format == "onnx":
        return export_onnx(state, source, out, int8=int8, settings=settings)
    write = write_multi_vector if format == "multi-vector" else write_pylate
    out = refuse_existing(out)
    model = model_from_state(state, source, settings)
    refuse_mcls(model, format)
    with atomic_folder(out) as aside:
        write(aside, model, Path(source), facts)
        return verify_folder(aside, model, source, reload_heads)
