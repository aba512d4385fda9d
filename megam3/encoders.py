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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megam3.errors import ConfigError
from megam3.model_files import read_model_object, refuse_links_out

LayerKind = Literal["post_norm", "gated", "rms", "rms_wide"]
"""Which tensors an encoder layer is made of: BERT's, ModernBERT's, Llama's, Gemma 3's."""


@dataclass(frozen=True, kw_only=True)
class EncoderFamily:
    """What is known of every encoder of one `model_type`."""

    positions_after_padding: bool
    """Position ids start at pad_token_id + 1, so that many rows of the table hold no position."""
    runs_packed: bool = True
    """Has a parity test against its own padded forward in tests/model."""
    layer: LayerKind | None = None
    """What a layer keeps for its backward pass (megam3/planning/layers.py); None: the memory plan has not
    counted it."""
    norms_heads: bool = False
    """Queries and keys are normed head by head."""
    biases: tuple[str, ...] = ()
    """Which linear layers and norms have biases: `all`, `qkv`, or as these fields of config.json say."""
    has_pooler: bool = True
    """The stock class takes `add_pooling_layer`."""
    is_rotary: bool = False
    """Positions turn queries and keys (arXiv 2104.09864): there is no table of positions to lengthen."""
    direction_field: Literal["", "is_causal", "use_bidirectional_attention"] = ""
    """Field of config.json by which transformers reads a left-to-right model in both directions; empty: the
    family reads in both directions and cannot do otherwise."""

    @property
    def is_counted(self) -> bool:
        """Whether the memory plan knows it."""
        return self.layer is not None

    @property
    def is_gated(self) -> bool:
        """The feed-forward block multiplies two projections (arXiv 2002.05202): three matrices instead of
        two."""
        return self.layer not in (None, "post_norm")


Direction = Literal["bidirectional", "causal"]
"""Which tokens a token sees: all of its text, or those before it and itself."""

LEXICAL_FILE = "sparse_linear.pt"
"""{"weight": [1, D], "bias": [1]}, the published name of the lexical head."""
MULTI_VECTOR_FILE = "colbert_linear.pt"
"""{"weight": [C, D], "bias": [C]}, the published name of the multi-vector head."""
HEAD_FILES = {"lexical": LEXICAL_FILE, "multi_vector": MULTI_VECTOR_FILE}
"""What lies beside an encoder with heads, by head; the dense head has no weights."""

_BERT: dict[str, Any] = {"layer": "post_norm", "biases": ("all",)}
_ROTARY: dict[str, Any] = {
    "positions_after_padding": False,
    "has_pooler": False,
    "is_rotary": True,
    "layer": "rms",
}

FAMILIES: dict[str, EncoderFamily] = {
    "bert": EncoderFamily(**_BERT, positions_after_padding=False),
    "camembert": EncoderFamily(**_BERT, positions_after_padding=True),
    "data2vec-text": EncoderFamily(positions_after_padding=True, runs_packed=False),
    "electra": EncoderFamily(**_BERT, positions_after_padding=False, has_pooler=False),
    "eurobert": EncoderFamily(**_ROTARY, biases=("attention_bias", "mlp_bias")),
    "gemma3_text": EncoderFamily(
        **{**_ROTARY, "layer": "rms_wide"},
        norms_heads=True,
        biases=("attention_bias",),
        direction_field="use_bidirectional_attention",
    ),
    "llama": EncoderFamily(**_ROTARY, biases=("attention_bias", "mlp_bias"), direction_field="is_causal"),
    "mistral": EncoderFamily(**_ROTARY, direction_field="is_causal"),
    "modernbert": EncoderFamily(
        **{**_ROTARY, "layer": "gated"}, biases=("attention_bias", "mlp_bias", "norm_bias")
    ),
    "qwen2": EncoderFamily(**_ROTARY, biases=("qkv",), direction_field="is_causal"),
    "qwen3": EncoderFamily(
        **_ROTARY, norms_heads=True, biases=("attention_bias",), direction_field="is_causal"
    ),
    "roberta": EncoderFamily(**_BERT, positions_after_padding=True),
    "xlm-roberta": EncoderFamily(**_BERT, positions_after_padding=True),
    # norms before the blocks, and one at the end in the place of the embeddings': the same tensors
    "xlm-roberta-xl": EncoderFamily(**_BERT, positions_after_padding=True),
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
    multi_vector_weights: int | None = None
    """Entries of that head's matrices; None: it is one matrix, hidden size x width."""
    query_width: int | None = None
    """All query heads side by side: heads x head_dim; None: the hidden size."""
    key_width: int | None = None
    """All key heads side by side, and as wide again for values: fewer than the queries' where groups of query
    heads share one (arXiv 2305.13245); None: the queries' width."""
    is_gated: bool = False
    """Three matrices in the feed-forward block instead of two."""
    is_causal: bool = False
    """Tokens see those before them and themselves."""
    num_windowed_layers: int = 0
    """Layers that see a window only."""
    window_reach: int = 0
    """Tokens that such a layer sees to each side (to the left when causal), without the token itself."""

    def visible_pairs(self, length: int, *, windowed: bool = False) -> int:
        """(query, key) pairs that one layer scores in a text of `length` tokens.

        >>> shape = EncoderShape(num_layers=1, hidden_size=8, intermediate_size=8, window_reach=1)
        >>> shape.visible_pairs(4), shape.visible_pairs(4, windowed=True)
        (16, 10)
        """
        reach = min(self.window_reach, length - 1) if windowed else length - 1
        # each side of the diagonal holds length - 1, length - 2, ..., length - reach pairs
        one_side = reach * length - reach * (reach + 1) // 2
        return length + one_side * (1 if self.is_causal else 2)

    def forward_flops(self, lengths: Sequence[int]) -> int:
        """Floating-point operations of one forward pass over texts of these token counts.

        A matrix product [m,k]x[k,n] is 2·m·k·n. Per token and layer: query and output projections (4·H·Q),
        keys and values (4·H·K), the feed-forward block (4·H·I, gated 6·H·I); attention adds 2·Q for the score
        and 2·Q for the weighted sum of each (query, key) pair that the layer may see. The lexical head costs
        2·H, the multi-vector head 2·H·C a token, or twice its entries where it has several matrices. Norms,
        activations and look-ups are left out, as is usual.
        """
        hidden, num_tokens = self.hidden_size, sum(lengths)
        queries = self.query_width or hidden
        keys = self.key_width or queries
        matrices = 3 if self.is_gated else 2
        per_token = 4 * hidden * (queries + keys) + 2 * matrices * hidden * self.intermediate_size
        projection = self.multi_vector_weights or hidden * self.multi_vector_dim
        heads = 2 * (hidden + projection) if self.multi_vector_dim else 0
        num_global = self.num_layers - self.num_windowed_layers
        pairs = num_global * sum(self.visible_pairs(length) for length in lengths)
        pairs += self.num_windowed_layers * sum(self.visible_pairs(n, windowed=True) for n in lengths)
        return self.num_layers * num_tokens * per_token + 4 * queries * pairs + num_tokens * heads

    def training_flops(self, lengths: Sequence[int]) -> int:
        """Forward and backward: three times the forward pass. Recomputation is a cost, not the model's work:
        not counted."""
        return 3 * self.forward_flops(lengths)


def read_shape(
    encoder: Mapping[str, Any], *, multi_vector_dim: int = 0, multi_vector_weights: int | None = None
) -> EncoderShape:
    """The sizes in the config.json of a served family (as written, or as `PretrainedConfig.to_dict` gives
    it)."""
    family = FAMILIES[str(encoder["model_type"])]
    hidden, heads = int(encoder["hidden_size"]), int(encoder["num_attention_heads"])
    head_dim = int(encoder.get("head_dim") or hidden // heads)
    windows = [reach for reach in window_reaches(encoder) if reach is not None]
    return EncoderShape(
        num_layers=int(encoder["num_hidden_layers"]),
        hidden_size=hidden,
        intermediate_size=int(encoder["intermediate_size"]),
        multi_vector_dim=multi_vector_dim,
        multi_vector_weights=multi_vector_weights,
        query_width=heads * head_dim,
        key_width=int(encoder.get("num_key_value_heads") or heads) * head_dim,
        is_gated=family.is_gated,
        is_causal=is_causal(encoder),
        num_windowed_layers=len(windows),
        window_reach=windows[0] if windows else 0,
    )


def is_causal(encoder: Mapping[str, Any]) -> bool:
    """Whether an encoder of this config.json reads left to right; an absent field means what it does in
    transformers."""
    family = FAMILIES.get(str(encoder.get("model_type")))
    field = "" if family is None else family.direction_field
    if not field:
        return False
    return bool(encoder.get(field, True)) if field == "is_causal" else not encoder.get(field)


def window_reaches(encoder: Mapping[str, Any]) -> list[int | None]:
    """By layer, how many tokens it sees to a side without the token itself; None: the whole text.

    ModernBERT names the whole window (`local_attention` 128: 64 to each side), and so does Gemma 3 when read
    in both directions; left-to-right models name it with the token itself (`sliding_window` 4096: 4095).
    """
    model_type, num_layers = encoder.get("model_type"), int(encoder["num_hidden_layers"])
    kinds = encoder.get("layer_types")
    if model_type == "modernbert":
        every = int(encoder.get("global_attn_every_n_layers") or 3)
        kinds = kinds or [
            "full_attention" if i % every == 0 else "sliding_attention" for i in range(num_layers)
        ]
        reach = int(encoder.get("local_attention") or 128) // 2
    else:
        is_off = model_type in ("qwen2", "qwen3") and not encoder.get("use_sliding_window")
        window = None if is_off else encoder.get("sliding_window")
        if window is None or "sliding_window" not in encoder:
            return [None] * num_layers
        reach = int(window) - 1 if is_causal(encoder) else int(window) // 2
        kinds = kinds or _layer_kinds(encoder, num_layers)
    return [reach if kind == "sliding_attention" else None for kind in kinds]


def _layer_kinds(encoder: Mapping[str, Any], num_layers: int) -> list[str]:
    """Kinds of a config.json that does not list them."""
    if encoder["model_type"] == "gemma3_text":
        pattern = int(encoder.get("sliding_window_pattern") or 6)
        return [
            "full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(num_layers)
        ]
    first = int(encoder.get("max_window_layers") or 0)  # Qwen keeps the first layers global, Mistral none
    return ["full_attention" if i < first else "sliding_attention" for i in range(num_layers)]


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
    if encoder.get("attn_logit_softcapping"):
        rule = "caps its attention scores (attn_logit_softcapping), which no packed kernel does"
        return ConfigError("model.path", source, rule, remedy)
    turned = FAMILIES[str(model_type)].direction_field == "is_causal" and not is_causal(encoder)
    # transformers makes such windows one token wider in both directions than left to right
    if turned and any(reach is not None for reach in window_reaches(encoder)):
        rule = "has windows, which its family reads left to right only"
        return ConfigError("model.path", source, rule, "set model.attention: causal")
    rope_type = _rope_types(encoder) & {"dynamic", "longrope"}
    if rope_type:
        rule = (
            f"has rotary positions of type {sorted(rope_type)[0]!r}, which depend on the longest text of a"
            " batch: a text would change with its neighbours"
        )
        return ConfigError("model.path", source, rule, "use rope_type yarn, linear, llama3 or default")
    kind = encoder.get("position_embedding_type") or "absolute"
    # mmBERT names its rotary positions here, in a word that nothing reads
    if kind != "absolute" and not FAMILIES[str(model_type)].is_rotary:
        rule = f"has position_embedding_type {kind!r}, which transformers no longer runs"
        return ConfigError("model.path", source, rule, "use absolute positions")
    return None


def find_direction_problem(model_type: str, attention: Direction | None, source: str) -> ConfigError | None:
    """Why a family cannot read in direction `attention`, or None."""
    family = FAMILIES.get(model_type)
    if attention != "causal" or family is None or family.direction_field:
        return None
    rule = f"{source} is a {model_type!r} model, which reads in both directions only"
    return ConfigError("model.attention", attention, rule, "leave it out")


def _rope_types(encoder: Mapping[str, Any]) -> set[str]:
    """Kinds of rotary positions that a config.json names; transformers 4 calls the section rope_scaling."""
    section = encoder.get("rope_parameters") or encoder.get("rope_scaling") or {}
    parts = [section, *(part for part in section.values() if isinstance(part, Mapping))]
    return {str(part.get("rope_type") or part.get("type")) for part in parts}


def read_encoder_config(path: str) -> dict[str, Any]:
    """`config.json` of the encoder's folder `path`.

    Raises:
        ConfigError: no folder, no config.json, not a JSON object, or a link that leads out of the folder.
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
    refuse_links_out(folder)
    return read_model_object(file)


EXPANSION_FAMILIES = ("xlm-roberta", "roberta", "camembert")
"""Encoders whose published masked-LM head is dense, gelu, layer norm and the embedding matrix."""


def find_expansion_problem(encoder: Mapping[str, Any]) -> ConfigError | None:
    """Why an encoder with this config.json cannot have an expansion head; None: it can."""
    family = encoder.get("model_type")
    if family in EXPANSION_FAMILIES:
        return None
    rule = f"starts from the masked-LM head of {', '.join(EXPANSION_FAMILIES)}; this encoder is {family}"
    return ConfigError("model.lexical_kind", "expansion", rule, "use lexical_kind: tokens")
