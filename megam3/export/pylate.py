"""The multi-vector head for pylate's ColBERT. It leaves skip-listed tokens out of passages only: `<s>` stays
in queries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megam3.export.model_card import CardFacts, multi_vector_card
from megam3.export.token_vectors import skipped_words, write_token_vector_files
from megam3.files import write_json
from megam3.model.m3 import M3Model

QUERY_TOKENS = 512
"""Longer queries are cut by pylate; the paper's limit (arXiv 2402.03216, table 8)."""


def write_pylate(out: Path, model: M3Model, source: Path, facts: CardFacts) -> None:
    """All files into the empty folder `out`, unchecked.

    Raises:
        CheckpointError: the model has no multi-vector head.
    """
    max_tokens, layers = write_token_vector_files(out, model, source, {})
    write_modules(out, layers)
    settings = {
        "query_prefix": "",
        "document_prefix": "",
        "query_length": min(QUERY_TOKENS, max_tokens),
        "document_length": max_tokens,
        "attend_to_expansion_tokens": False,
        "do_query_expansion": False,
        "skiplist_words": skipped_words(model, source),
        "similarity_fn_name": "MaxSim",
        "prompts": facts.instructions.prompts(),
        "default_prompt_name": None,
    }
    write_json(out / "config_sentence_transformers.json", settings)
    (out / "README.md").write_text(multi_vector_card("PyLate", max_tokens, facts), encoding="utf-8")


def write_modules(out: Path, layers: Sequence[str]) -> None:
    """modules.json: the encoder, then the layers in the folders `layers`."""
    kinds = {"": "sentence_transformers.models.Transformer"}
    kinds |= dict.fromkeys(layers, "pylate.models.Dense.Dense")
    modules = [
        {"idx": idx, "name": str(idx), "path": path, "type": kind}
        for idx, (path, kind) in enumerate(kinds.items())
    ]
    write_json(out / "modules.json", modules)
