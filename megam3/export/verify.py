"""Does an exported folder, read back from disk, represent text exactly as the weights in memory do?"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megam3.config.head_layers import find_layers
from megam3.config.schema import LoraConfig, ModelConfig
from megam3.encoders import HEAD_FILES
from megam3.errors import CheckpointError, ConfigError
from megam3.model.backbone import build_backbone, load_encoder_config
from megam3.model.lora import has_lora, merge_lora
from megam3.model.m3 import M3Model, max_model_tokens, represent
from megam3.model.pretrained import (
    find_first_id,
    find_special_ids,
    held_heads,
    load_m3,
    load_tokenizer_of,
    read_settings,
)
from megam3.packed_texts import pack_texts
from megam3.token_layers import TokenLayer

TOLERANCE = 1e-5
"""Largest difference of any number of any head, fp32."""
SAMPLE_TEXTS = (
    "What is a heading, and where does it stand?",
    "Une page d'aide explique une seule tâche, pas à pas.",
    "Die Länge eines Textes ändert nichts an seinem Inhalt: 3,5 × 2 = 7.",
    "检索模型把查询和段落放进同一个空间。",
    "Справка открывается клавишей F1.",
    "x",
)
"""Texts of several scripts and lengths; `verify_folder` adds one that fills the model."""


def refuse_existing(out: str | Path) -> Path:
    """`out` as a path.

    Raises:
        CheckpointError: it exists already.
    """
    if Path(out).exists():
        raise CheckpointError("export", str(out), "exists already", "remove it or choose another name")
    return Path(out)


def model_from_state(
    state: Mapping[str, Tensor], source: str, settings: ModelConfig | None = None
) -> M3Model:
    """The model in memory: the config of folder `source` around the weights `state` (keys of an M3Model),
    fp32, in eval mode, read as the run's `settings` say (None: as the folder says).

    Raises:
        CheckpointError: weights of another model.
    """
    settings = settings or ModelConfig(path=source)
    if has_lora(state):
        state = merge_lora(state, _lora_settings(settings))
    config = load_encoder_config(source, settings.attention)
    reading = read_settings(source, config, settings)
    tokenizer = load_tokenizer_of(source)
    width, layers = _projection(state, source, settings, config.hidden_size)
    trained = {name: any(key.startswith(f"{name}_head.") for key in state) for name in HEAD_FILES}
    expands = any(key.startswith("expansion_head.") for key in state)
    trained["lexical"] |= expands
    model = M3Model(
        build_backbone(config),
        find_special_ids(tokenizer),
        multi_vector_dim=width,
        multi_vector_layers=layers,
        heads=["dense", *(name for name, is_there in trained.items() if is_there)],
        expands=expands,
        expansion_top_k=settings.expansion_top_k,
        reading=reading,
        first_id=find_first_id(tokenizer, source, reading),
    )
    _refuse_other_weights(state, model, source)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval()


def _refuse_other_weights(state: Mapping[str, Tensor], model: M3Model, source: str) -> None:
    """Names and shapes must be those of the model.

    Raises:
        CheckpointError: some are missing, unknown or of another shape; names the first two.
    """
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    shapes = [
        f"{n} {tuple(state[n].shape)} instead of {tuple(wanted[n])}"
        for n in wanted.keys() & state.keys()
        if state[n].shape != wanted[n]
    ]
    for names, fault in (
        (missing, "lacks"),
        (unknown, "holds unknown"),
        (sorted(shapes), "has other shapes:"),
    ):
        if names:
            rest = f" and {len(names) - 2} more" if len(names) > 2 else ""
            raise CheckpointError(
                "checkpoint",
                source,
                f"it {fault} {', '.join(names[:2])}{rest}",
                "name the folder this checkpoint was trained from",
            )


def _projection(
    state: Mapping[str, Tensor], source: str, settings: ModelConfig, hidden_size: int
) -> tuple[int | None, tuple[TokenLayer, ...]]:
    """Width and layers of the multi-vector head whose weights are in `state`."""
    biases = [name for name in state if re.fullmatch(r"multi_vector_head\.(\d+\.linear\.)?bias", name)]
    if not biases:
        return None, ()
    width = state[max(biases)].shape[0]
    if not is_layered(state):
        return width, ()
    layers = find_layers(Path(source), settings, hidden_size, width)
    if not layers:
        rule = (
            "these weights hold a multi-vector head of several layers, and nothing says what is between them"
        )
        remedy = "export a checkpoint inside its run folder, whose recipe.yaml has model.multi_vector_hidden"
        raise CheckpointError("checkpoint", source, rule, remedy)
    return width, layers


def is_layered(state: Mapping[str, Tensor]) -> bool:
    """Whether the multi-vector head among the weights `state` of an M3Model is a chain of layers."""
    return "multi_vector_head.0.linear.weight" in state


def _lora_settings(settings: ModelConfig) -> LoraConfig:
    if settings.lora is not None:
        return settings.lora
    rule = "these weights hold low-rank adapters, and nothing says what alpha they were trained with"
    remedy = "export a checkpoint inside its run folder, whose recipe.yaml has model.lora"
    raise CheckpointError("checkpoint", settings.path, rule, remedy)


def refuse_mcls(model: M3Model, format: str) -> None:
    """The model's vectors can be computed by readers that put no `<s>` into a text.

    Raises:
        ConfigError: they cannot.
    """
    if model.reading.pooling == "mcls":
        rule = f"{format} is read by libraries that put no <s> into a text: every vector would differ"
        raise ConfigError("model.pooling", "mcls", rule, "export it as bge-m3, for M3Embedder")


def reload_heads(folder: Path, model: M3Model) -> M3Model:
    """The model in an exported folder, with those of `model`'s heads that it holds."""
    held = [name for name in model.heads if name in held_heads(str(folder))]
    return load_m3(str(folder), ModelConfig(path=str(folder)), heads=held).eval()


@torch.no_grad()
def largest_differences(
    folder: Path, model: M3Model, reload: Callable[[Path, M3Model], M3Model] = reload_heads
) -> dict[str, float]:
    """Largest absolute difference per head that both have, between the model in `folder`, read back by
    `reload`, and `model`; inf where shapes or ids differ."""
    tokenizer = load_tokenizer_of(str(folder))
    texts = [*SAMPLE_TEXTS, " ".join([*SAMPLE_TEXTS] * 64)]
    # mcls puts tokens in, which need positions too
    limit = min(2048, tokenizer.model_max_length, max_model_tokens(model))
    reloaded = reload(folder, model)
    packed = pack_texts(tokenizer(texts, truncation=True, max_length=limit)["input_ids"])
    ours, theirs = represent(model, packed), represent(reloaded, packed)

    def difference(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max()) if a.shape == b.shape else float("inf")

    found = {"dense": difference(ours.dense_ND, theirs.dense_ND)}
    both = set(model.heads) & set(reloaded.heads)
    if "lexical" in both:
        same_ids = torch.equal(ours.lexical_ids_Z, theirs.lexical_ids_Z)
        value = difference(ours.lexical_weights_Z, theirs.lexical_weights_Z)
        found["lexical"] = value if same_ids else float("inf")
    if "multi_vector" in both:
        found["multi_vector"] = difference(ours.multi_KC, theirs.multi_KC)
    return found


def verify_folder(
    folder: Path, model: M3Model, source: str, reload: Callable[[Path, M3Model], M3Model] = reload_heads
) -> dict[str, float]:
    """`largest_differences`, refused above TOLERANCE, and the tokenizer of `folder` compared with `source`'s.

    Raises:
        CheckpointError: a head differs, or the tokenizers read a text differently.
    """
    verify_tokenizer(folder, source)
    differences = largest_differences(folder, model, reload)
    refuse_large(differences)
    return differences


def verify_tokenizer(folder: Path, source: str) -> None:
    """The tokenizers of both folders read the sample texts alike.

    Raises:
        CheckpointError: they do not.
    """
    texts = list(SAMPLE_TEXTS)
    if load_tokenizer_of(str(folder))(texts)["input_ids"] != load_tokenizer_of(source)(texts)["input_ids"]:
        raise CheckpointError(
            "export",
            str(folder),
            "its tokenizer reads the sample texts differently",
            f"check the tokenizer files of {source}",
        )


def refuse_large(differences: Mapping[str, float]) -> None:
    """Every difference is at most TOLERANCE.

    Raises:
        CheckpointError: one is not, or is not a number.
    """
    for head, value in differences.items():
        if not value <= TOLERANCE:
            raise CheckpointError(
                "export",
                value,
                f"largest difference of the {head} head must be at most {TOLERANCE}",
                "nothing was written",
            )
