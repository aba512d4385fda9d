"""Stock Hugging Face encoders on packed texts: which ones can be served, how they are loaded, and one forward
pass over a stream.

    encoder = load_backbone("models/xlm-roberta-base")
    hidden_TD = encode_packed(encoder, texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1,
    texts.lengths)

Nothing of the encoder is rewritten: its config selects `megam3_packed`, and `cu_seqlens` travels through the
encoder's keyword arguments.
"""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pickle import UnpicklingError

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from megam3.encoders import (
    FAMILIES,
    Direction,
    find_direction_problem,
    find_packing_problem,
    is_causal,
    position_offset,
)
from megam3.errors import CheckpointError
from megam3.model.attention import (
    PACKED_ATTENTION,
    choose_attention,
    equal_length_runs,
    wished_attention,
)
from megam3.model.rows import select_unique_rows

# weights a checkpoint may carry although the bare encoder has no place for them: poolers, task heads, and
# buffers of old versions
_SPARE_KEYS = re.compile(
    r"(^|\.)(pooler|lm_head|cls|classifier|qa_outputs|head|decoder|discriminator_predictions|generator_predictions|generator_lm_head)\."
    r"|(position_ids|token_type_ids)$"
)


def check_encoder_config(config: PretrainedConfig, source: str) -> None:
    """Refuse an encoder that cannot run packed, before its weights load.

    Raises:
        ConfigError: another family, a decoder, or relative positions.
    """
    problem = find_packing_problem({**config.to_dict(), "model_type": config.model_type}, source)
    if problem is not None:
        raise problem


def reads_causally(config: PretrainedConfig) -> bool:
    """Whether the encoder reads left to right."""
    field = FAMILIES[config.model_type].direction_field
    facts: dict[str, object] = {"model_type": config.model_type}
    if field and hasattr(config, field):
        facts[field] = getattr(config, field)
    return is_causal(facts)


def first_position(config: PretrainedConfig) -> int:
    """What the encoder's position ids start at: pad_token_id + 1 for the RoBERTa families (row 2 for XLM-R),
    else 0."""
    return position_offset(config.model_type, config.pad_token_id)


def max_text_tokens(config: PretrainedConfig) -> int:
    """Longest text the encoder has positions for."""
    return config.max_position_embeddings - first_position(config)


def load_backbone(
    source: str,
    *,
    hidden_dropout: float | None = None,
    attention_dropout: float | None = None,
    attention: Direction | None = None,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """The encoder in folder `source`, without pooler, set to packed attention; an HfDeepSpeedConfig that is
    alive partitions it. `attention`: see `load_encoder_config`.

    Raises:
        ConfigError: an encoder that cannot be served.
        CheckpointError: no readable folder, or weights that do not fit the config.
    """
    config = load_encoder_config(source, attention)
    override_dropout(config, hidden_dropout, attention_dropout)
    options = {
        "config": config,
        "attn_implementation": PACKED_ATTENTION,
        "dtype": dtype,
        **_without_pooler(config),
    }
    try:
        with _quiet_transformers():
            encoder, report = AutoModel.from_pretrained(
                source, output_loading_info=True, trust_remote_code=False, **options
            )
    except (OSError, RuntimeError, ValueError, UnpicklingError) as error:
        raise CheckpointError(
            "model.path", source, f"the encoder's weights cannot be loaded ({error})", "check the folder"
        ) from error
    _check_loading(source, report)
    return encoder


def build_backbone(config: PretrainedConfig, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A randomly initialised encoder of this config, set to packed attention; also right under ZeRO-3, where
    the class itself fails.

    Raises:
        ConfigError: an encoder that cannot be served.
    """
    check_encoder_config(config, config.name_or_path or config.model_type)
    # a copy: whoever builds a second model from the same object sets its attention, and so would change this
    # encoder's
    config = copy.deepcopy(config)
    return AutoModel.from_config(
        config,
        attn_implementation=PACKED_ATTENTION,
        dtype=dtype,
        trust_remote_code=False,
        **_without_pooler(config),
    )


def load_encoder_config(source: str, attention: Direction | None = None) -> PretrainedConfig:
    """The config in folder `source`, checked to be one that runs packed.

    Args:
        attention: read a model made left to right in this direction; None: as its config says.

    Raises:
        ConfigError: an encoder that cannot be served, or not in this direction.
        CheckpointError: no readable config.json.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(
            "model.path",
            source,
            f"holds no readable config.json ({error})",
            "give a Hugging Face encoder folder",
        ) from error
    if attention is not None:
        config = turn_config(config, attention, source)
    check_encoder_config(config, source)
    return config


def turn_config(config: PretrainedConfig, attention: Direction, source: str) -> PretrainedConfig:
    """`config` with its text read in direction `attention`; transformers reads the field that is set here, so
    a folder with this config gives the same vectors there.

    Raises:
        ConfigError: an encoder that reads in both directions only.
    """
    problem = find_direction_problem(config.model_type, attention, source)
    if problem is not None:
        raise problem
    field = FAMILIES[config.model_type].direction_field
    if not field or reads_causally(config) == (attention == "causal"):
        return config
    # built anew, not set: Gemma 3 halves its windows when it is built for both directions
    turned = {**config.to_dict(), field: (attention == "causal") == (field == "is_causal")}
    return type(config).from_dict(turned)


def encode_packed(
    encoder: PreTrainedModel,
    input_ids_T: Tensor,
    position_ids_T: Tensor,
    cu_seqlens_N1: Tensor,
    lengths: tuple[int, ...],
) -> Tensor:
    """Last hidden states [T, D] of a packed stream; equal to the encoder's own padded forward at the real
    tokens.

    A stream without texts gives [0, D] that still hangs on every parameter: a rank with nothing to encode
    takes part in the backward pass.
    """
    # any other attention would run without complaint and let every text see all others
    assert encoder.config._attn_implementation == PACKED_ATTENTION, (
        "the encoder's attention was changed after it was loaded"
    )
    if not lengths:
        one = input_ids_T.new_zeros(1)
        return encode_packed(
            encoder, one, one, torch.tensor([0, 1], dtype=torch.int32, device=one.device), (1,)
        )[:0]
    order_T = None
    choice = choose_attention(
        encoder.config,
        input_ids_T.device,
        encoder.dtype,
        encoder.training,
        wished_attention(encoder),
    )
    if choice.kernel == "runs":
        order_T, lengths = _equal_lengths_together(lengths, cu_seqlens_N1)
    if order_T is not None:
        input_ids_T, position_ids_T = input_ids_T[order_T], position_ids_T[order_T]
    hidden_TD = encoder(
        input_ids=input_ids_T.unsqueeze(0),
        position_ids=(position_ids_T + first_position(encoder.config)).unsqueeze(0),
        # of the order made above; the runs do not read it, and it would be that of another order
        cu_seqlens=cu_seqlens_N1 if choice.kernel == "varlen" else None,
        lengths=lengths,
        max_length=max(lengths),
        kernel=choice.kernel,
        **_direction_options(encoder.config),
    ).last_hidden_state.squeeze(0)
    return hidden_TD if order_T is None else select_unique_rows(hidden_TD, order_T.argsort())


def _direction_options(config: PretrainedConfig) -> dict[str, bool]:
    """What a family that can read left to right must be told: the direction, which its layers do not know,
    and to keep no keys for generation."""
    if not FAMILIES[config.model_type].direction_field:
        return {}
    return {"causal": reads_causally(config), "use_cache": False}


def _equal_lengths_together(
    lengths: tuple[int, ...], cu_seqlens_N1: Tensor
) -> tuple[Tensor | None, tuple[int, ...]]:
    """Token order that sorts the texts by length, and the lengths in it; no order when equal lengths are
    neighbours already."""
    if len(equal_length_runs(lengths)) == len(set(lengths)):
        return None, lengths
    device = cu_seqlens_N1.device
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    new_lengths = tuple(lengths[i] for i in order)
    order_N, lengths_N = torch.tensor(order, device=device), torch.tensor(new_lengths, device=device)
    # token t of the new stream, in text n, comes from: old start of n + (t - new start of n)
    shift_N = cu_seqlens_N1[:-1].long()[order_N] - (lengths_N.cumsum(0) - lengths_N)
    num_tokens = sum(lengths)
    return torch.arange(num_tokens, device=device) + shift_N.repeat_interleave(
        lengths_N, output_size=num_tokens
    ), new_lengths


def _without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    return {"add_pooling_layer": False} if FAMILIES[config.model_type].has_pooler else {}


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No bar and no load report per rank: what the report would say is checked here, and is an error."""
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()


def override_dropout(config: PretrainedConfig, hidden: float | None, attention: float | None) -> None:
    """Write the recipe's probabilities over the encoder's own, under the names its family uses."""
    names = {"hidden_dropout_prob": hidden, "embedding_dropout": hidden, "mlp_dropout": hidden}
    names |= {"attention_probs_dropout_prob": attention, "attention_dropout": attention}
    for name, value in names.items():
        if value is not None and hasattr(config, name):
            setattr(config, name, value)


def _check_loading(source: str, report: dict) -> None:
    """transformers logs what it did not find and starts it at random; that is never what a user wants
    here."""
    missing = sorted(report["missing_keys"])
    mismatched = sorted(str(key) for key in report["mismatched_keys"])
    unknown = sorted(key for key in report["unexpected_keys"] if not _SPARE_KEYS.search(key))
    for keys, fault in (
        (missing, "misses"),
        (mismatched, "has other shapes than its config for"),
        (unknown, "holds what its config has not:"),
    ):
        if keys:
            names = ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
            raise CheckpointError(
                "model.path",
                source,
                f"the weight file {fault} {names}",
                "use the config.json that belongs to the weights",
            )
