"""A pretrained encoder with its language-model head, for AutoModelForMaskedLM: keys `roberta.*` and
`lm_head.*`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel

from megam3.errors import CheckpointError
from megam3.export.encoder_files import published_config
from megam3.export.tokenizer_files import write_tokenizer_files
from megam3.export.verify import SAMPLE_TEXTS, refuse_existing, refuse_large, verify_tokenizer
from megam3.files import atomic_folder, read_json, write_json
from megam3.model.backbone import max_text_tokens
from megam3.model.pretrained import load_tokenizer_of


def export_mlm(state: Mapping[str, Tensor], source: str, out: str | Path) -> dict[str, float]:
    """Write `encoder.*` and the language-model head of `state` (the stock names, `lm_head.*` for XLM-R) as
    `out`.

    Returns:
        {"mlm": largest difference of the logits between the folder read back and the weights in memory}.

    Raises:
        CheckpointError: `out` exists, there is no such head in `state`, or the folder read back differs.
    """
    out = refuse_existing(out)
    model = masked_lm_from_state(state, source)
    with atomic_folder(out) as aside:
        save_file(untied_weights(model), aside / "model.safetensors", metadata={"format": "pt"})
        write_json(
            aside / "config.json",
            published_config(read_json(Path(source) / "config.json"), type(model).__name__),
        )
        max_tokens = min(max_text_tokens(model.config), load_tokenizer_of(source).model_max_length)
        write_tokenizer_files(Path(source), aside, max_tokens)
        verify_tokenizer(aside, source)
        differences = {"mlm": _largest_difference(aside, model)}
        refuse_large(differences)
    return differences


def untied_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that a folder holds: those that repeat others are tied again by the reader."""
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}


def masked_lm_from_state(state: Mapping[str, Tensor], source: str) -> PreTrainedModel:
    """The stock masked-LM model of folder `source` around `encoder.*` and `lm_head.*` of `state`, fp32, in
    eval mode.

    Raises:
        CheckpointError: a weight of it is not in `state`.
    """
    model = AutoModelForMaskedLM.from_config(
        AutoConfig.from_pretrained(source, trust_remote_code=False),
        dtype=torch.float32,
        trust_remote_code=False,
    )
    prefix = model.base_model_prefix
    renamed = {
        f"{prefix}.{name[len('encoder.') :]}" if name.startswith("encoder.") else name: tensor.float()
        for name, tensor in state.items()
    }
    wanted = {
        name
        for name in model.state_dict()
        if name not in set(getattr(model, "_tied_weights_keys", None) or ())
    }
    missing = sorted(wanted - renamed.keys())
    if missing:
        more = f" and {len(missing) - 2} more" if len(missing) > 2 else ""
        raise CheckpointError(
            "export",
            source,
            f"the checkpoint lacks {', '.join(missing[:2])}{more}",
            "mlm is for checkpoints of pretraining; export a trained retriever as bge-m3",
        )
    model.load_state_dict({name: renamed[name] for name in wanted}, strict=False)
    model.tie_weights()
    return model.eval()


@torch.no_grad()
def _largest_difference(folder: Path, model: PreTrainedModel) -> float:
    tokenizer = load_tokenizer_of(str(folder))
    limit = min(256, tokenizer.model_max_length)
    texts = tokenizer(
        list(SAMPLE_TEXTS), padding=True, truncation=True, max_length=limit, return_tensors="pt"
    )
    reloaded = AutoModelForMaskedLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    return float((model(**texts).logits - reloaded(**texts).logits).abs().max())
