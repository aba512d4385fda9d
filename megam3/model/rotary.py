"""Longer texts for an encoder with rotary positions: other frequencies in its config.json, the same weights.

A rotary encoder turns pair i of a head's D entries by position · θ^(-2i/D) (arXiv 2104.09864). Beyond the
texts it was trained on, the slow pairs reach angles it never saw. With s = new length / old length:

    ntk    θ' = θ · s^(D / (D - 2)): the fastest pair stays, the slowest turns s times slower, so ends at the
           old angle; those between in proportion (NTK-aware interpolation, arXiv 2309.00071, section 3.1)
    yarn   pairs that turn often inside the old length stay, those that turn at most once slow down by s, with
           a ramp between, and attention is sharpened by 0.1 ln s + 1 (the same paper, sections 3.2 to 3.4)

Both are meant to be followed by training on long texts. Layers that see a window only (ModernBERT, Gemma 3)
keep their frequencies: no distance inside a window becomes new.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from transformers import PretrainedConfig

from megam3.encoders import FAMILIES
from megam3.errors import CheckpointError, ConfigError
from megam3.files import atomic_folder, read_json, write_json
from megam3.model.backbone import load_encoder_config
from megam3.model_files import read_model_object, refuse_links_out

RotaryMethod = Literal["ntk", "yarn"]
ROTARY_METHODS: tuple[str, ...] = get_args(RotaryMethod)
_OLD_FIELDS = ("rope_theta", "rope_scaling", "global_rope_theta", "local_rope_theta", "rope_local_base_freq")
"""Names of transformers 4, which a section `rope_parameters` takes the place of."""


def ntk_theta(theta: float, scale: float, head_dim: int) -> float:
    """θ' of the ntk method.

    >>> round(ntk_theta(10000.0, 4.0, 64))
    41829
    """
    return theta * scale ** (head_dim / (head_dim - 2))


def scaled_parameters(
    parameters: Mapping[str, Any], method: RotaryMethod, scale: float, head_dim: int, old: int
) -> dict[str, Any]:
    """One kind of layer's rotary section, scaled for texts `scale` times as long as `old` positions."""
    if method == "ntk":
        return {**parameters, "rope_theta": ntk_theta(float(parameters["rope_theta"]), scale, head_dim)}
    return {**parameters, "rope_type": "yarn", "factor": scale, "original_max_position_embeddings": old}


def is_rotary(config: PretrainedConfig) -> bool:
    """Whether the encoder has rotary positions, and so no table of them."""
    return FAMILIES[config.model_type].is_rotary


def scale_folder(source: str | Path, out: str | Path, max_tokens: int, method: str) -> tuple[int, int]:
    """Copy the rotary encoder's folder `source` to `out`, its frequencies scaled for `max_tokens` tokens.

    Returns:
        Tokens the encoder took before and takes now.

    Raises:
        ConfigError: no rotary encoder, one that is scaled already, shrinking, or a method for tables of
            positions.
        CheckpointError: `out` exists.
    """
    source, out = Path(source), Path(out)
    config = load_encoder_config(str(source))
    old = config.max_position_embeddings
    _refuse(config, source, max_tokens, method)
    if out.exists():
        raise CheckpointError("OUT", str(out), "exists already", "remove it or choose another name")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    parameters = config.rope_parameters
    by_kind = {k: v for k, v in parameters.items() if isinstance(v, dict)}

    def scaled(section: Mapping[str, Any]) -> dict[str, Any]:
        return scaled_parameters(section, method, max_tokens / old, head_dim, old)  # type: ignore[arg-type]

    if by_kind:
        parameters = {**by_kind, "full_attention": scaled(by_kind["full_attention"])}
    else:
        parameters = scaled(parameters)
    written = {
        key: value for key, value in read_json(source / "config.json").items() if key not in _OLD_FIELDS
    }
    refuse_links_out(source, "IN")
    with atomic_folder(out) as aside:
        shutil.copytree(source, aside, dirs_exist_ok=True)
        write_json(
            aside / "config.json",
            {**written, "rope_parameters": parameters, "max_position_embeddings": max_tokens},
        )
        for name, key in (
            ("tokenizer_config.json", "model_max_length"),
            ("sentence_bert_config.json", "max_seq_length"),
        ):
            if (aside / name).exists():
                content = read_model_object(aside / name)
                write_json(aside / name, {**content, key: max_tokens})
    return old, max_tokens


def _refuse(config: PretrainedConfig, source: Path, max_tokens: int, method: str) -> None:
    if not is_rotary(config):
        kind = f"{source} is a {config.model_type} model"
        rule = f"{kind}, whose positions are a table: there is no angle to scale"
        raise ConfigError("--method", method, rule, "use tile, interpolate or random")
    if method not in ROTARY_METHODS:
        rule = f"{source} is a {config.model_type} model, whose positions are rotary: it has no rows to add"
        remedy = f"use {' or '.join(ROTARY_METHODS)}, which scale its angles"
        raise ConfigError("--method", method, rule, remedy)
    if max_tokens <= config.max_position_embeddings:
        rule = f"must exceed the {config.max_position_embeddings} tokens that {source} takes already"
        raise ConfigError("--max-tokens", max_tokens, rule, "use it as it is")
    sections = [config.rope_parameters, *config.rope_parameters.values()]
    kinds = {str(s["rope_type"]) for s in sections if isinstance(s, dict) and s.get("rope_type")}
    if kinds - {"default"}:
        rule = f"{source} has scaled rotary positions already ({', '.join(sorted(kinds - {'default'}))})"
        raise ConfigError("--method", method, rule, "scale the encoder they were scaled from")
