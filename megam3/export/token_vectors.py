"""What the exports of the multi-vector head share: encoder at the top, the head as a `1_Dense` folder.

OUT/  config.json model.safetensors tokenizer files      the encoder
      1_Dense/config.json  1_Dense/model.safetensors     linear.weight [C, D], linear.bias [C]
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megam3.errors import CheckpointError
from megam3.export.bge_m3 import read_pooler
from megam3.export.encoder_files import write_encoder_files
from megam3.files import write_json
from megam3.model.backbone import load_backbone
from megam3.model.m3 import M3Model


def write_token_vector_files(out: Path, model: M3Model, source: Path, dense_config: dict[str, object]) -> int:
    """Encoder, tokenizer and head into `out`; `dense_config` adds keys of the consumer. Returns the longest
    text.

    Raises:
        CheckpointError: the model has no multi-vector head.
    """
    head = model.multi_vector_head
    if head is None:
        rule = "it has no multi-vector head, and this format holds nothing else"
        raise CheckpointError("export", ", ".join(model.heads), rule, "export it as bge-m3")
    max_tokens = write_encoder_files(out, model, source, read_pooler(source))
    folder = out / "1_Dense"
    folder.mkdir()
    sizes = {"in_features": head.in_features, "out_features": head.out_features, "bias": True}
    identity = {"activation_function": "torch.nn.modules.linear.Identity"}
    write_json(folder / "config.json", {**sizes, **identity, **dense_config})
    weights = {
        f"linear.{key}": value.detach().cpu().float().clone() for key, value in head.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    return max_tokens


def reload_token_vectors(folder: Path, model: M3Model) -> M3Model:
    """The model in such a folder: encoder and multi-vector head."""
    weights = load_file(folder / "1_Dense" / "model.safetensors")
    head = weights["linear.weight"]
    encoder = load_backbone(str(folder))
    reloaded = M3Model(
        encoder, model.special_ids, multi_vector_dim=head.shape[0], heads=("dense", "multi_vector")
    )
    assert reloaded.multi_vector_head is not None
    with torch.no_grad():
        reloaded.multi_vector_head.weight.copy_(head)
        reloaded.multi_vector_head.bias.copy_(weights["linear.bias"])
    return reloaded.eval()
