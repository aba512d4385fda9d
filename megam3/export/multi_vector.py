"""The multi-vector head for MultiVectorEncoder of sentence-transformers 6: Transformer, Dense, Normalize,
mask.

A folder of its own, since modules.json differs from the one that names the dense head.
"""

from __future__ import annotations

from pathlib import Path

from megam3.export.model_card import CardFacts, multi_vector_card
from megam3.export.token_vectors import write_token_vector_files
from megam3.files import write_json
from megam3.model.m3 import M3Model
from megam3.model.pretrained import load_tokenizer_of

_PATHS = {
    "": "sentence_transformers.base.modules.transformer.Transformer",
    "1_Dense": "sentence_transformers.base.modules.dense.Dense",
    "2_Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    "3_MultiVectorMask": (
        "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"
    ),
}
_NAMES = {"module_input_name": "token_embeddings", "module_output_name": "token_embeddings"}


def write_multi_vector(out: Path, model: M3Model, source: Path, facts: CardFacts) -> None:
    """All files into the empty folder `out`, unchecked.

    Raises:
        CheckpointError: the model has no multi-vector head.
    """
    max_tokens = write_token_vector_files(out, model, source, dict(_NAMES))
    modules = [
        {"idx": idx, "name": str(idx), "path": path, "type": kind}
        for idx, (path, kind) in enumerate(_PATHS.items())
    ]
    # M3 leaves <s> out on both sides and keeps </s>
    first_token = load_tokenizer_of(str(source)).cls_token
    mask = {
        "skiplist_words": [first_token],
        "skiplist_tasks": ["query", "document"],
        "keep_only_token_ids": None,
    }
    files: dict[str, object] = {
        "modules.json": modules,
        "2_Normalize/config.json": _NAMES,
        "3_MultiVectorMask/config.json": mask,
        "config_sentence_transformers.json": {
            "model_type": "MultiVectorEncoder",
            "similarity_fn_name": "meanmaxsim",
            "prompts": {},
            "default_prompt_name": None,
        },
    }
    for name, content in files.items():
        (out / name).parent.mkdir(exist_ok=True)
        write_json(out / name, content)
    card = multi_vector_card("sentence-transformers", max_tokens, facts)
    (out / "README.md").write_text(card, encoding="utf-8")
