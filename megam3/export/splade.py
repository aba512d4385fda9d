"""A model with an expansion head as one folder for transformers' AutoModelForMaskedLM, SparseEncoder of
sentence-transformers and M3Embedder.

    OUT/  config.json  model.safetensors              roberta.* and lm_head.*: the masked-LM model
          tokenizer files                             as in the other layouts
          modules.json  1_SpladePooling/config.json   MLMTransformer, then max of log(1 + relu(logits))
          sentence_bert_config.json  config_sentence_transformers.json
          colbert_linear.pt                           the multi-vector head, where there is one
          megam3_config.json                          says that the lexical head expands

Readers of the masked-LM model give special ids a weight like any other, training gave them none: their
entries of `lm_head.bias` are lowered so far that relu removes them.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megam3 import __version__
from megam3.config.schema import ModelConfig
from megam3.encoders import HEAD_FILES
from megam3.errors import ConfigError
from megam3.export.encoder_files import published_config
from megam3.export.mlm import masked_lm_from_state, untied_weights
from megam3.export.model_card import NO_FACTS, CardFacts
from megam3.export.tokenizer_files import write_tokenizer_files
from megam3.export.verify import model_from_state, refuse_existing, verify_folder
from megam3.files import atomic_folder, read_json, write_json
from megam3.instructions import PROMPTS_FILE
from megam3.model.m3 import M3Model, max_model_tokens
from megam3.model.pretrained import load_tokenizer_of
from megam3.reading import own_fields

NEVER = -1e4
"""Bias of ids without weight: below what any product of a layer-normalised row and an embedding adds."""

_SETTINGS = {
    "model_type": "SparseEncoder",
    "__version__": {"sentence_transformers": "5.0.0", "transformers": "4.50.0", "pytorch": "2.6.0"},
    "similarity_fn_name": "dot",
}
_FILES: dict[str, object] = {
    "modules.json": [
        {
            "idx": 0,
            "name": "0",
            "path": "",
            "type": "sentence_transformers.sparse_encoder.models.MLMTransformer",
        },
        {
            "idx": 1,
            "name": "1",
            "path": "1_SpladePooling",
            "type": "sentence_transformers.sparse_encoder.models.SpladePooling",
        },
    ],
    PROMPTS_FILE: _SETTINGS,
}


def export_splade(
    state: Mapping[str, Tensor],
    source: str,
    out: str | Path,
    facts: CardFacts = NO_FACTS,
    settings: ModelConfig | None = None,
) -> dict[str, float]:
    """Write `state` (keys of an M3Model with an expansion head) as `out`, read it back and compare;
    `settings` is the run's section `model`.

    Returns:
        The largest difference per head.

    Raises:
        ConfigError: the model has no expansion head.
        CheckpointError: `out` exists, the weights do not fit, or the folder differs.
    """
    if not any(name.startswith("expansion_head.") for name in state):
        rule = "is for models with an expansion head, which this one does not have"
        raise ConfigError("format", "splade", rule, "use bge-m3, or train with model.lexical_kind: expansion")
    out = refuse_existing(out)
    model = model_from_state(state, source, settings)
    with atomic_folder(out) as aside:
        _write(aside, model, state, source, facts)
        return verify_folder(aside, model, source)


def _write(out: Path, model: M3Model, state: Mapping[str, Tensor], source: str, facts: CardFacts) -> None:
    renamed = {name.replace("expansion_head.", "lm_head."): value for name, value in state.items()}
    renamed = {name: value for name, value in renamed.items() if name.startswith(("encoder.", "lm_head."))}
    bias_V = renamed["lm_head.bias"].float().clone()
    bias_V[list(model.special_ids)] = NEVER
    masked_lm = masked_lm_from_state({**renamed, "lm_head.bias": bias_V}, source)
    save_file(untied_weights(masked_lm), out / "model.safetensors", metadata={"format": "pt"})
    config = published_config(read_json(Path(source) / "config.json"), type(masked_lm).__name__)
    write_json(out / "config.json", config)
    # a tokenizer that names no limit has one of thirty digits
    max_tokens = min(max_model_tokens(model), load_tokenizer_of(source).model_max_length)
    write_tokenizer_files(Path(source), out, max_tokens)
    if model.multi_vector_head is not None:
        head = {k: v.detach().cpu().float().clone() for k, v in model.multi_vector_head.state_dict().items()}
        torch.save(head, out / HEAD_FILES["multi_vector"])
    (out / "1_SpladePooling").mkdir()
    pooling = {
        "pooling_strategy": "max",
        "activation_function": "relu",
        "word_embedding_dimension": model.encoder.config.vocab_size,
    }
    own = {
        "megam3_version": __version__,
        "heads": list(model.heads),
        "lexical_kind": "expansion",
        "expansion_top_k": model.expansion_top_k,
        # modules.json speaks of the lexical head alone, so nothing else says how the dense vector is read
        **own_fields(model.reading),
    }
    files = {
        **_FILES,
        "1_SpladePooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": False},
        "megam3_config.json": {**own, "special_ids": list(model.special_ids)},
    }
    if facts.instructions:
        files[PROMPTS_FILE] = {**_SETTINGS, "prompts": facts.instructions.prompts()}
    for name, content in files.items():
        write_json(out / name, content)
