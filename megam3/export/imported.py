"""A model of others → a folder that training continues from.

Read are: folders of the published layout (fp16 heads become fp32), encoders alone, dense models of
sentence-transformers (both styles of modules.json), and what FlagEmbedding's trainer wrote (checkpoint-N
folders, whose
encoder keys carry the prefix `model.`).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megam3.encoders import HEAD_FILES, find_packing_problem, read_encoder_config
from megam3.errors import CheckpointError
from megam3.export.tokenizer_files import write_tokenizer_files
from megam3.export.verify import refuse_existing
from megam3.files import atomic_folder, read_json, write_json
from megam3.model.backbone import load_backbone
from megam3.model.pretrained import load_tokenizer_of

_TRAINER_PREFIX = "model."
_SHARDS = re.compile(r"^(model|pytorch_model).*\.(safetensors|bin)$")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What was found in a folder."""

    heads: tuple[str, ...]
    """Heads with weights; the others start from scratch (model.missing_heads: init)."""
    stripped_prefix: bool
    """Keys had FlagEmbedding's prefix."""
    pooling: str | None
    """sentence-transformers' pooling, when the folder names one."""

    def notes(self) -> list[str]:
        """What a user should know before training goes on."""
        missing = [head for head in HEAD_FILES if head not in self.heads]
        found = []
        if missing:
            found.append(f"no weights for {', '.join(missing)}: train with model.missing_heads=init")
        if self.pooling not in (None, "cls"):
            found.append(
                f"its dense vector was pooled by {self.pooling!r}; megam3 reads the first token,"
                " so the dense "
                "head begins worse than the model was"
            )
        if self.stripped_prefix:
            found.append("stripped the prefix `model.` of FlagEmbedding's trainer")
        return found


def import_model(source: str, out: str | Path) -> Imported:
    """Write the model in folder `source` as folder `out`, fp32, keys without prefix; it is loaded once to
    check it.

    Raises:
        ConfigError: an encoder that cannot be served.
        CheckpointError: `out` exists, no weights, unreadable or unfitting ones.
    """
    folder = Path(source)
    problem = find_packing_problem(config := read_encoder_config(source), source)
    if problem:
        raise problem
    out = refuse_existing(out)
    weights, stripped = _read_weights(folder)
    heads = {
        head: _read_head(folder / file, int(config["hidden_size"]), head)
        for head, file in HEAD_FILES.items()
        if (folder / file).is_file()
    }
    with atomic_folder(out) as aside:
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(folder / "config.json", aside / "config.json")
        for head, state in heads.items():
            torch.save(state, aside / HEAD_FILES[head])
        length = load_tokenizer_of(source).model_max_length
        write_tokenizer_files(folder, aside, length)
        imported = Imported(heads=tuple(heads), stripped_prefix=stripped, pooling=read_pooling(folder))
        write_json(aside / "megam3_import.json", {"source": source, "notes": imported.notes()})
        load_backbone(str(aside))
    return imported


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], bool]:
    files = sorted(file for file in folder.iterdir() if _SHARDS.match(file.name))
    safe = [file for file in files if file.suffix == ".safetensors"]
    if not files:
        rule = "holds neither model*.safetensors nor pytorch_model*.bin"
        raise CheckpointError("import", str(folder), rule, "give a folder with weights, not a run's own root")
    state: dict[str, Tensor] = {}
    for file in safe or files:
        try:
            part = load_file(file) if safe else torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a class for each way in which a file can be damaged
            reason = str(error).splitlines()[0][:200]
            raise CheckpointError(
                "import", str(file), f"cannot be read ({reason})", "copy it again"
            ) from error
        state |= part
    _refuse_missing_shards(folder, state)
    stripped = all(key.startswith(_TRAINER_PREFIX) for key in state)
    cut = len(_TRAINER_PREFIX) if stripped else 0
    # an embedding tied to a language-model head is the same memory twice, which safetensors refuses
    return {
        key[cut:]: tensor.float().clone() if tensor.is_floating_point() else tensor.clone()
        for key, tensor in state.items()
    }, stripped


def _refuse_missing_shards(folder: Path, state: dict[str, Tensor]) -> None:
    for index in folder.glob("*.index.json"):
        missing = sorted(set(read_json(index)["weight_map"]) - state.keys())
        if missing:
            rule = (
                f"is incomplete: {index.name} names {missing[0]} and {len(missing) - 1} more"
                " that no file holds"
            )
            raise CheckpointError("import", str(folder), rule, "copy all weight files")


def _read_head(file: Path, hidden_size: int, head: str) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        weight, bias = state["weight"].float(), state["bias"].float()
    except Exception as error:  # see _read_weights; a dict without both keys is as unusable as a damaged file
        reason = str(error).splitlines()[0][:200]
        remedy = "it must hold {'weight': …, 'bias': …}; remove it to start this head from scratch"
        raise CheckpointError("import", str(file), f"cannot be read as a head ({reason})", remedy) from error
    rows = 1 if head == "lexical" else weight.shape[0]
    if weight.shape != (rows, hidden_size) or bias.shape != (rows,):
        # ZeRO-3 training in FlagEmbedding 1.4 writes tensors of shape (0,) and reports nothing
        rule = f"weight has shape {tuple(weight.shape)}, the encoder needs ({rows}, {hidden_size})"
        remedy = "use the head of this encoder, or remove the file to start it from scratch"
        raise CheckpointError("import", str(file), rule, remedy)
    return {"weight": weight, "bias": bias}


def read_pooling(folder: Path) -> str | None:
    """The pooling of a sentence-transformers folder, `cls` or another name; None when it names none.

    Both styles: `pooling_mode_cls_token: true` (before 5.7), and `pooling_mode: "cls"`.
    """
    if not (folder / "modules.json").is_file():
        return None
    for module in read_json(folder / "modules.json"):
        file = folder / module["path"] / "config.json"
        if module["type"].rsplit(".", 1)[-1] == "Pooling" and file.is_file():
            return _pooling_name(read_json(file))
    return None


def _pooling_name(config: dict[str, Any]) -> str:
    if "pooling_mode" in config:
        return str(config["pooling_mode"])
    modes = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    names = [
        key.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token") for key in modes
    ]
    return "+".join(names) or "mean"
