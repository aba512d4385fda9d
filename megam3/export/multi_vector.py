"""The multi-vector head for MultiVectorEncoder of sentence-transformers 6: Transformer, Dense, Normalize,
mask.

A folder of its own, since modules.json differs from the one that names the dense head.
"""

from __future__ import annotations

from pathlib import Path

from megam3.export.model_card import CardFacts, multi_vector_card
from megam3.export.token_vectors import skipped_words, write_token_vector_files
from megam3.files import write_json
from megam3.model.m3 import M3Model

_MODULES = "sentence_transformers.base.modules"
_MASK = "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"
_NAMES = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}


def write_multi_vector(out: Path, model: M3Model, source: Path, facts: CardFacts) -> None:
    """All files into the empty folder `out`, unchecked.

    Raises:
        CheckpointError: the model has no multi-vector head.
    """
    max_tokens, layers = write_token_vector_files(out, model, source, _NAMES)
    last = len(layers)
    kinds = {"": f"{_MODULES}.transformer.Transformer"}
    kinds |= dict.fromkeys(layers, f"{_MODULES}.dense.Dense")
    kinds |= {
        f"{last + 1}_Normalize": f"{_MODULES}.normalize.Normalize",
        f"{last + 2}_MultiVectorMask": _MASK,
    }
    modules = [
        {"idx": idx, "name": str(idx), "path": path, "type": kind}
        for idx, (path, kind) in enumerate(kinds.items())
    ]
    # M3 leaves <s> out on both sides and keeps </s>
    mask = {
        "skiplist_words": skipped_words(model, source),
        "skiplist_tasks": ["query", "document"],
        "keep_only_token_ids": None,
    }
    files: dict[str, object] = {
        "modules.json": modules,
        f"{last + 1}_Normalize/config.json": _NAMES,
        f"{last + 2}_MultiVectorMask/config.json": mask,
        "config_sentence_transformers.json": {
            "model_type": "MultiVectorEncoder",
            "similarity_fn_name": "meanmaxsim",
            "prompts": facts.instructions.prompts(),
            "default_prompt_name": None,
        },
    }
    for name, content in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        write_json(out / name, content)
    card = multi_vector_card("sentence-transformers", max_tokens, facts)
    (out / "README.md").write_text(card, encoding="utf-8")
