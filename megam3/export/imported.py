"""A model of others → a folder that training continues from.

Read are: folders of the published layout (fp16 heads become fp32), encoders alone, dense models of
sentence-transformers (both styles of modules.json), multi-vector models of PyLate and of
sentence-transformers 6 (their layers become the multi-vector head), and what FlagEmbedding's trainer wrote
(checkpoint-N folders, whose encoder keys carry the prefix `model.`).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megam3.config.head_layers import find_layers
from megam3.config.schema import ModelConfig
from megam3.encoders import HEAD_FILES, find_packing_problem, read_encoder_config
from megam3.errors import CheckpointError
from megam3.export.pylate import write_modules
from megam3.export.token_vectors import write_layers
from megam3.export.tokenizer_files import write_tokenizer_files
from megam3.export.verify import refuse_existing
from megam3.files import atomic_folder, read_json, write_json
from megam3.instructions import PROMPTS_FILE, Instructions, read_instructions
from megam3.model.backbone import load_backbone
from megam3.model.head_files import read_heads
from megam3.model.pretrained import load_m3, load_tokenizer_of
from megam3.reading import OWN_FILE, POOLINGS, own_fields, read_pooling, resolve_reading
from megam3.token_layers import TokenLayer, find_vector_layers, has_head, read_token_layers

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
    vector_layers: tuple[str, ...] = ()
    """Layers behind its pooling, which are not imported."""
    instructions: Instructions = Instructions()
    """sentence-transformers' prompts or PyLate's prefixes."""

    def notes(self) -> list[str]:
        """What a user should know before training goes on."""
        missing = [head for head in HEAD_FILES if head not in self.heads]
        found = []
        if missing:
            found.append(f"no weights for {', '.join(missing)}: train with model.missing_heads=init")
        if self.pooling in POOLINGS and self.pooling != "cls":
            found.append(f"its dense vector is pooled by {self.pooling!r}, and training goes on so")
        elif self.pooling not in (None, "cls"):
            found.append(
                f"its dense vector was pooled by {self.pooling!r}, which megam3 does not do; the first token"
                " (or the last, read left to right) takes its place, so the dense head begins worse than the"
                " model was"
            )
        if self.vector_layers:
            found.append(
                f"its dense vector went through {', '.join(self.vector_layers)}, which megam3 has no place"
                " for: the dense head begins worse than the model was"
            )
        if self.instructions:
            found.append(
                f"its folder puts {self.instructions.query!r} before queries, {self.instructions.passage!r}"
                " before passages: set the datasets' query_instruction and passage_instruction to them"
            )
        if self.stripped_prefix:
            found.append("stripped the prefix `model.` of FlagEmbedding's trainer")
        return found


def import_model(source: str, out: str | Path, *, new_heads: bool = False) -> Imported:
    """Write the model in folder `source` as folder `out`, fp32, keys without prefix; it is loaded once to
    check it.

    Args:
        new_heads: also write the heads that the folder lacks, as training would start them; what was trained
            can then be compared and merged with where it began.

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
    hidden_size = int(config["hidden_size"])
    heads = {
        head: _read_head(folder / file, hidden_size, head)
        for head, file in HEAD_FILES.items()
        if (folder / file).is_file()
    }
    layers = _read_layers(folder, hidden_size, heads)
    with atomic_folder(out) as aside:
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
        shutil.copyfile(folder / "config.json", aside / "config.json")
        for head, state in heads.items():
            torch.save(state, aside / HEAD_FILES[head])
        length = load_tokenizer_of(source).model_max_length
        write_tokenizer_files(folder, aside, length)
        if layers:
            write_modules(aside, write_layers(aside, layers))
        imported = Imported(
            heads=tuple(name for name in HEAD_FILES if name in heads or (layers and name == "multi_vector")),
            stripped_prefix=stripped,
            pooling=read_pooling(folder),
            vector_layers=tuple(find_vector_layers(folder)),
            instructions=read_instructions(folder),
        )
        if imported.pooling in POOLINGS:
            reading = resolve_reading(source, config)
            write_json(aside / OWN_FILE, own_fields(reading))
        if imported.instructions:
            write_json(aside / PROMPTS_FILE, {"prompts": imported.instructions.prompts()})
        write_json(aside / "megam3_import.json", {"source": source, "notes": imported.notes()})
        load_backbone(str(aside))
        if new_heads:
            _write_new_heads(aside)
    return imported


def _read_layers(
    folder: Path, hidden_size: int, heads: dict[str, dict[str, Tensor]]
) -> list[tuple[TokenLayer, dict[str, Tensor]]]:
    """A multi-vector head that lies in layers: several are returned, a single matrix joins `heads`."""
    chain = find_layers(folder, ModelConfig(path=str(folder)), hidden_size)
    if "multi_vector" in heads or not read_token_layers(folder):
        return []
    found = read_heads(folder, ["multi_vector"], "error")["multi_vector"]
    if isinstance(found, list):
        return list(zip(chain, found, strict=True))
    assert found is not None
    heads["multi_vector"] = found
    return []


def _write_new_heads(folder: Path) -> None:
    settings = ModelConfig(path=str(folder), missing_heads="init")
    model = load_m3(str(folder), settings, dtype=torch.float32)
    for name, head in (("lexical", model.lexical_head), ("multi_vector", model.multi_vector_head)):
        file = folder / HEAD_FILES[name]
        if head is not None and not has_head(folder, name):
            torch.save({key: value.detach().clone() for key, value in head.state_dict().items()}, file)


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
