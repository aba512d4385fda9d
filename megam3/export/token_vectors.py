"""What the exports of the multi-vector head share: encoder at the top, each layer of the head in a folder.

OUT/  config.json model.safetensors tokenizer files      the encoder
      1_Dense/config.json  1_Dense/model.safetensors     linear.weight [C, D], linear.bias [C]
      2_Dense/ …                                         where the head is a chain of layers
      sparse_linear.pt  megam3_config.json               for M3Embedder: the lexical head, and how to read
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors.torch import save_file
from torch import Tensor

from megam3 import __version__
from megam3.encoders import HEAD_FILES
from megam3.errors import CheckpointError
from megam3.export.bge_m3 import read_pooler
from megam3.export.encoder_files import write_encoder_files
from megam3.files import write_json
from megam3.model.m3 import M3Model
from megam3.model.pretrained import load_tokenizer_of
from megam3.model.projection import Projection
from megam3.reading import OWN_FILE
from megam3.token_layers import WEIGHTS_FILE, TokenLayer, layer_config


def write_token_vector_files(
    out: Path, model: M3Model, source: Path, consumer_keys: Mapping[str, object]
) -> tuple[int, list[str]]:
    """Encoder, tokenizer and heads into `out`; `consumer_keys` go into each layer's config.

    Returns:
        The longest text, and the folders of the layers in their order.

    Raises:
        CheckpointError: the model has no multi-vector head.
    """
    head = model.multi_vector_head
    if head is None:
        rule = "it has no multi-vector head, and this format holds nothing else"
        raise CheckpointError("export", ", ".join(model.heads), rule, "export it as bge-m3")
    max_tokens = write_encoder_files(out, model, source, read_pooler(source))
    places = write_layers(out, layers_of(head), consumer_keys)
    write_json(out / "sentence_bert_config.json", {"max_seq_length": max_tokens, "do_lower_case": False})
    heads = [name for name in model.heads if name != "lexical" or model.lexical_head is not None]
    if model.lexical_head is not None:
        torch.save(_on_host(model.lexical_head.state_dict()), out / HEAD_FILES["lexical"])
    own = {
        "megam3_version": __version__,
        "heads": heads,
        "max_tokens": max_tokens,
        "special_ids": list(model.special_ids),
        "pooling": model.reading.pooling,
    }
    write_json(out / OWN_FILE, own)
    return max_tokens, places


def layers_of(head: torch.nn.Linear | Projection) -> list[tuple[TokenLayer, dict[str, Tensor]]]:
    """Each layer of a multi-vector head and its weights, under the names that the consumers use."""
    if isinstance(head, Projection):
        return [(layer, dict(part.state_dict())) for layer, part in zip(head.layers, head)]
    layer = TokenLayer(in_features=head.in_features, out_features=head.out_features)
    return [(layer, {f"linear.{name}": value for name, value in head.state_dict().items()})]


def write_layers(
    out: Path,
    layers: Sequence[tuple[TokenLayer, Mapping[str, Tensor]]],
    consumer_keys: Mapping[str, object] = MappingProxyType({}),
) -> list[str]:
    """config.json and weights of each layer into new folders of `out`, whose names are returned."""
    places = [f"{number}_Dense" for number in range(1, len(layers) + 1)]
    for place, (layer, state) in zip(places, layers):
        (out / place).mkdir()
        write_json(out / place / "config.json", {**layer_config(layer), **consumer_keys})
        save_file(_on_host(state), out / place / WEIGHTS_FILE, metadata={"format": "pt"})
    return places


def _on_host(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().float().clone() for name, value in state.items()}


def skipped_words(model: M3Model, source: Path) -> list[str]:
    """The token that has no multi-vector row: the first of a text, where the tokenizer puts one."""
    if model.first_id is None:
        return []
    return [str(load_tokenizer_of(str(source)).convert_ids_to_tokens(model.first_id))]
