"""Does an exported folder, read back from disk, represent text exactly as the weights in memory do?"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megam3.batch import pack_texts
from megam3.config.schema import ModelConfig
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


def model_from_state(state: Mapping[str, Tensor], source: str) -> M3Model:
    """The model in memory: the config of folder `source` around the weights `state` (keys of an M3Model), fp32, in eval mode.

    Raises:
        CheckpointError: weights of another model.
    """
    config = load_encoder_config(source)
    head = state.get("multi_vector_head.weight")
    model = M3Model(
        build_backbone(config),
        read_special_ids(source),
        multi_vector_dim=None if head is None else head.shape[0],
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


@torch.no_grad()
def largest_differences(
    folder: Path, model: M3Model, texts: Sequence[str] = SAMPLE_TEXTS
) -> dict[str, float]:
    """Largest absolute difference per head between the model in `folder`, read back, and `model`; inf where shapes or ids differ."""
    tokenizer = load_tokenizer_of(str(folder))
    texts = [*texts, " ".join([*texts] * 64)]
    token_ids = tokenizer(texts, truncation=True, max_length=min(2048, tokenizer.model_max_length))[
        "input_ids"
    ]
    reloaded = load_m3(str(folder), ModelConfig(path=str(folder))).eval()
    packed = pack_texts(token_ids)
    ours, theirs = represent(model, packed), represent(reloaded, packed)

    def difference(a: Tensor, b: Tensor) -> float:
        return float((a - b).abs().max()) if a.shape == b.shape else float("inf")

    same_ids = torch.equal(ours.lexical_ids_Z, theirs.lexical_ids_Z)
    return {
        "dense": difference(ours.dense_ND, theirs.dense_ND),
        "lexical": difference(ours.lexical_weights_Z, theirs.lexical_weights_Z) if same_ids else float("inf"),
        "multi_vector": difference(ours.multi_KC, theirs.multi_KC),
    }


def verify_folder(folder: Path, model: M3Model, source: str) -> dict[str, float]:
    """`largest_differences`, refused above TOLERANCE, and the tokenizer of `folder` compared with that of `source`.

    Raises:
        CheckpointError: a head differs, or the tokenizers read a text differently.
    """
    texts = list(SAMPLE_TEXTS)
    if load_tokenizer_of(str(folder))(texts)["input_ids"] != load_tokenizer_of(source)(texts)["input_ids"]:
        raise CheckpointError(
            "export",
            str(folder),
            "its tokenizer reads the sample texts differently",
            f"check the tokenizer files of {source}",
        )
    differences = largest_differences(folder, model)
    for head, value in differences.items():
        if not value <= TOLERANCE:
            raise CheckpointError(
                "export",
                value,
                f"largest difference of the {head} head must be at most {TOLERANCE}",
                "nothing was written",
            )
    return differences
