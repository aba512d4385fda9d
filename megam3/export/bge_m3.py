"""The published BGE-M3 layout: one folder for transformers, FlagEmbedding, sentence-transformers (dense) and
M3Embedder.

    OUT/  config.json  model.safetensors                                   the encoder, keys without prefix
          tokenizer.json  tokenizer_config.json  special_tokens_map.json  sentencepiece.bpe.model
          sparse_linear.pt  colbert_linear.pt                              the lexical and the multi-vector
          head
          modules.json  1_Pooling/config.json  sentence_bert_config.json  config_sentence_transformers.json
          megam3_config.json  README.md

It is written aside, read back and compared; only then does it get its name.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from megam3 import __version__
from megam3.config import recipe_yaml
from megam3.config.schema import ModelConfig
from megam3.encoders import HEAD_FILES
from megam3.errors import CheckpointError
from megam3.export.encoder_files import write_encoder_files
from megam3.export.model_card import NO_FACTS, CardFacts, bge_m3_card
from megam3.export.sentence_transformers_files import write_sentence_transformers_files
from megam3.export.verify import model_from_state, refuse_existing, verify_folder
from megam3.files import atomic_folder, write_json
from megam3.instructions import PROMPTS_FILE
from megam3.model.m3 import M3Model
from megam3.reading import OWN_FILE, own_fields


def export_bge_m3(
    state: Mapping[str, Tensor],
    source: str,
    out: str | Path,
    facts: CardFacts = NO_FACTS,
    settings: ModelConfig | None = None,
) -> dict[str, float]:
    """Write the weights `state` (keys of an M3Model) as a folder `out`; `source`, where training began, gives
    config, tokenizer and pooler; `facts` of the run go into the model card; `settings` is the run's
    section `model`.

    Returns:
        The largest difference per head between the folder, read back, and the weights in memory.

    Raises:
        CheckpointError: `out` exists, the weights are of another model, or the folder read back differs; no
        folder stays behind.
    """
    out = refuse_existing(out)
    model = model_from_state(state, source, settings)
    with atomic_folder(out) as aside:
        write_bge_m3(aside, model, Path(source), facts)
        return verify_folder(aside, model, source)


def write_bge_m3(out: Path, model: M3Model, source: Path, facts: CardFacts = NO_FACTS) -> None:
    """All files of the layout into the empty folder `out`, unchecked (see `export_bge_m3`)."""
    hidden_size = model.encoder.config.hidden_size
    max_tokens = write_encoder_files(out, model, source, read_pooler(source))
    heads = {"lexical": model.lexical_head, "multi_vector": model.multi_vector_head}
    for name, head in heads.items():
        if head is not None:
            weights = {
                key: tensor.detach().cpu().float().clone() for key, tensor in head.state_dict().items()
            }
            torch.save(weights, out / HEAD_FILES[name])
    # a folder that is opened as one without them would pool otherwise and say nothing
    if model.reading.pooling != "mcls":
        write_sentence_transformers_files(
            out, hidden_size, max_tokens, model.reading.pooling, facts.instructions
        )
    elif facts.instructions:
        write_json(out / PROMPTS_FILE, {"prompts": facts.instructions.prompts()})
    width = None if model.multi_vector_head is None else model.multi_vector_head.out_features
    own = {
        "megam3_version": __version__,
        "heads": list(model.heads),
        "multi_vector_dim": width,
        "max_tokens": max_tokens,
        "special_ids": list(model.special_ids),
        **own_fields(model.reading),
    }
    write_json(out / OWN_FILE, own)
    card = bge_m3_card(model.heads, hidden_size, width, max_tokens, facts, model.reading.pooling)
    (out / "README.md").write_text(card, encoding="utf-8")


def read_pooler(source: Path) -> dict[str, Tensor]:
    """`pooler.*` of the source's weights, if any: never trained here, but other readers start a missing one
    at random."""
    pattern = re.compile(r"^(?:[a-z_]+\.)?(pooler\..+)$")
    found: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found |= {
                match[1]: weights.get_tensor(key)
                for key in weights.keys()  # noqa: SIM118
                if (match := pattern.match(key))
            }
    if not found:
        for file in sorted(source.glob("pytorch_model*.bin")):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            found |= {match[1]: tensor for key, tensor in state.items() if (match := pattern.match(key))}
    return {name: tensor.float().contiguous() for name, tensor in found.items()}


def _model_path(recipe: Path) -> str:
    data = recipe_yaml.read(recipe).data
    assert isinstance(data, dict), "a run writes its resolved recipe, a mapping of sections"
    return str(data["model"]["path"])


def source_of_checkpoint(checkpoint: str | Path) -> str:
    """The folder a run's model came from: `model.path` in the recipe of the run that `checkpoint`
    (RUN/checkpoints/STEP) belongs to.

    When that folder is gone, or the checkpoint was moved out of its run, the checkpoint's own `model/`:
    config and tokenizer, no pooler.

    Raises:
        CheckpointError: there is neither.
    """
    folder = Path(checkpoint).resolve()
    for parent in folder.parents[:2]:
        recipe = parent / "recipe.yaml"
        if recipe.exists():
            path = _model_path(recipe)
            if Path(path).is_dir():
                return path
    if (folder / "model" / "config.json").is_file():
        return str(folder / "model")
    rule = "no folder of the model it was trained from: neither model.path of its run nor a model/ of its own"
    raise CheckpointError(
        "checkpoint", str(checkpoint), rule, "name a checkpoint folder, or the model's folder with --model"
    )
