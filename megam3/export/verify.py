"""Does an exported folder, read back from disk, represent text exactly as the weights in memory do?"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megam3.batch import pack_texts
from megam3.config.schema import ModelConfig
from megam3.encoders import HEAD_FILES
from megam3.errors import CheckpointError
from megam3.model.backbone import build_backbone, load_encoder_config
from megam3.model.m3 import M3Model, represent
from megam3.model.pretrained import load_m3, load_tokenizer_of, read_special_ids

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


def model_from_state(state: Mapping[str, Tensor], source: str) -> M3Model:
    """The model in memory: the config of folder `source` around the weights `state` (keys of an M3Model),
    fp32, in eval mode.

    Raises:
        CheckpointError: weights of another model.
    """
    config = load_encoder_config(source)
    head = state.get("multi_vector_head.weight")
    trained = {name: any(key.startswith(f"{name}_head.") for key in state) for name in HEAD_FILES}
    model = M3Model(
        build_backbone(config),
        read_special_ids(source),
        multi_vector_dim=None if head is None else head.shape[0],
        heads=["dense", *(name for name, is_there in trained.items() if is_there)],
    )
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
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return model.eval()


def reload_bge_m3(folder: Path, model: M3Model) -> M3Model:
    """The model in a folder of the bge-m3 layout, with the heads that `model` has."""
    return load_m3(str(folder), ModelConfig(path=str(folder)), heads=model.heads).eval()


@torch.no_grad()
def largest_differences(
    folder: Path, model: M3Model, reload: Callable[[Path, M3Model], M3Model] = reload_bge_m3
) -> dict[str, float]:
    """Largest absolute difference per head that both have, between the model in `folder`, read back by
    `reload`, and `model`; inf where shapes or ids differ."""
    tokenizer = load_tokenizer_of(str(folder))
    texts = [*SAMPLE_TEXTS, " ".join([*SAMPLE_TEXTS] * 64)]
    limit = min(2048, tokenizer.model_max_length)
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
    folder: Path, model: M3Model, source: str, reload: Callable[[Path, M3Model], M3Model] = reload_bge_m3
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
