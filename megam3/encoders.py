"""Encoder families: one table of what megam3 knows of each, the reader of config.json, and sizes. Free of
torch.

Whoever needs to know whether an encoder runs packed, where its positions begin, or whether the memory plan
has
counted its layers asks here: the checks of a recipe (before a device is touched), the loader of weights, the
tools and the memory plan.

    position ids of a text of 3 tokens      bert 0 1 2         xlm-roberta 2 3 4   (rows 0 and 1 hold none)
    tokens that 8194 rows serve             bert 8194          xlm-roberta 8192
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megam3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """What is known of every encoder of one `model_type`."""

    positions_after_padding: bool
    """Position ids start at pad_token_id + 1, so that many rows of the table hold no position."""
    runs_packed: bool = True
    """Has a parity test against its own padded forward in tests/model."""
    is_counted: bool = False
    """The memory plan has counted what its layers save (megam3/planning)."""
    has_pooler: bool = True
    """The stock class takes `add_pooling_layer`."""


LEXICAL_FILE = "sparse_linear.pt"
"""{"weight": [1, D], "bias": [1]}, the published name of the lexical head."""
MULTI_VECTOR_FILE = "colbert_linear.pt"
"""{"weight": [C, D], "bias": [C]}, the published name of the multi-vector head."""
HEAD_FILES = {"lexical": LEXICAL_FILE, "multi_vector": MULTI_VECTOR_FILE}
"""What lies beside an encoder with heads, by head; the dense head has no weights."""

FAMILIES: dict[str, EncoderFamily] = {
    "bert": EncoderFamily(positions_after_padding=False, is_counted=True),
    "camembert": EncoderFamily(positions_after_padding=True, is_counted=True),
    "data2vec-text": EncoderFamily(positions_after_padding=True, runs_packed=False),
    "electra": EncoderFamily(positions_after_padding=False, is_counted=True, has_pooler=False),
    "modernbert": EncoderFamily(positions_after_padding=False, has_pooler=False),
    "roberta": EncoderFamily(positions_after_padding=True, is_counted=True),
    "xlm-roberta": EncoderFamily(positions_after_padding=True, is_counted=True),
    "xlm-roberta-xl": EncoderFamily(positions_after_padding=True),
    # its language adapters read one language id a batch, which a stream of mixed texts does not have
    "xmod": EncoderFamily(positions_after_padding=True, runs_packed=False),
}
"""By `model_type`. Families that do not run packed are listed where a user may bring one, so that the refusal
is right."""


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """The sizes that decide an encoder's arithmetic."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    multi_vector_dim: int = 0
    """Width of the multi-vector head; 0: without heads."""

    def forward_flops(self, lengths: Sequence[int]) -> int:
        """Floating-point operations of one forward pass over texts of these token counts.

        A matrix product [m,k]x[k,n] is 2·m·k·n. Per token and layer: four H x H projections (8·H²) and two H
        x I (4·H·I); attention adds 2·L·H for the scores and 2·L·H for the weighted sum to each of a text's L
        tokens. The lexical head costs 2·H, the multi-vector head 2·H·C a token. Norms, activations and
        look-ups are left out, as is usual.
        """
        hidden, num_tokens = self.hidden_size, sum(lengths)
        per_token = 8 * hidden**2 + 4 * hidden * self.intermediate_size
        heads = 2 * hidden * (self.multi_vector_dim + 1) if self.multi_vector_dim else 0
        attention = 4 * hidden * sum(length**2 for length in lengths)
        return self.num_layers * (num_tokens * per_token + attention) + num_tokens * heads

    def training_flops(self, lengths: Sequence[int]) -> int:
        """Forward and backward: three times the forward pass. Recomputation is a cost, not the model's work:
        not counted."""
        return 3 * self.forward_flops(lengths)


def served_families() -> tuple[str, ...]:
    """`model_type` of every family that runs packed."""
    return tuple(name for name, family in FAMILIES.items() if family.runs_packed)


def counted_families() -> tuple[str, ...]:
    """`model_type` of every family whose memory can be planned."""
    return tuple(name for name, family in FAMILIES.items() if family.is_counted)


def position_offset(model_type: str, pad_token_id: int | None) -> int:
    """What an encoder's position ids start at; families that are not in the table start at 0.

    A config without `pad_token_id` gets 1, the default of every family that counts from there.
    """
    family = FAMILIES.get(model_type)
    if family is None or not family.positions_after_padding:
        return 0
    return (1 if pad_token_id is None else pad_token_id) + 1


def usable_positions(encoder: Mapping[str, Any]) -> int | None:
    """Tokens the longest text may have, from a config.json; None when it does not say.

    >>> usable_positions({"model_type": "xlm-roberta", "max_position_embeddings": 8194, "pad_token_id": 1})
    8192
    """
    rows, pad = encoder.get("max_position_embeddings"), encoder.get("pad_token_id")
    if not isinstance(rows, int):
        return None
    return rows - position_offset(str(encoder.get("model_type")), pad if isinstance(pad, int) else None)


def find_packing_problem(encoder: Mapping[str, Any], source: str) -> ConfigError | None:
    """Why an encoder cannot run on packed texts, or None; `encoder` is what its config.json holds."""
    remedy = f"use an encoder of one of these families: {', '.join(served_families())}"
    model_type = encoder.get("model_type")
    if model_type not in served_families():
        rule = f"is a {model_type!r} model, which does not run on packed texts (cu_seqlens, position_ids)"
        return ConfigError("model.path", source, rule, remedy)
    if encoder.get("is_decoder") or encoder.get("add_cross_attention"):
        rule = "is configured as a decoder; retrieval needs attention in both directions"
        return ConfigError("model.path", source, rule, remedy)
    kind = encoder.get("position_embedding_type") or "absolute"
    if kind != "absolute":
        rule = f"has position_embedding_type {kind!r}, which transformers no longer runs"
        return ConfigError("model.path", source, rule, "use absolute positions")
    return None


def read_encoder_config(path: str) -> dict[str, Any]:
    """`config.json` of the encoder's folder `path`.

    Raises:
        ConfigError: no folder, no config.json, or not a JSON object.
    """
    folder = Path(path)
    if not folder.is_dir():
        remedy = "give a local Hugging Face folder; a model of a hub has to be downloaded first"
        raise ConfigError("model.path", path, "no such folder", remedy)
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(
            "model.path", path, "holds no config.json", "give the folder that `save_pretrained` wrote"
        )
    remedy = "restore the file from the model's source"
    try:
        encoder = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(str(file), str(error), "is not readable JSON", remedy) from None
    if not isinstance(encoder, dict):
        raise ConfigError(str(file), type(encoder).__name__, "must hold a JSON object", remedy)
    return encoder
