"""The published BGE-M3 layout: one folder for transformers, FlagEmbedding, sentence-transformers (dense) and M3Embedder.

    OUT/  config.json  model.safetensors                                   the encoder, keys without prefix
          tokenizer.json  tokenizer_config.json  special_tokens_map.json  sentencepiece.bpe.model
          sparse_linear.pt  colbert_linear.pt                              the lexical and the multi-vector head
          modules.json  1_Pooling/config.json  sentence_bert_config.json  config_sentence_transformers.json
          megam3_config.json  README.md

It is written aside, read back and compared; only then does it get its name.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megam3 import __version__
from megam3.config import recipe_yaml
from megam3.encoders import LEXICAL_FILE, MULTI_VECTOR_FILE
from megam3.errors import CheckpointError
from megam3.export.sentence_transformers_files import write_sentence_transformers_files
from megam3.export.tokenizer_files import write_tokenizer_files
from megam3.export.verify import model_from_state, verify_folder
from megam3.model.backbone import max_text_tokens
from megam3.model.m3 import M3Model
from megam3.model.pretrained import load_tokenizer_of

# fields of the published config.json that transformers 5 no longer writes and older readers look for
_PUBLISHED_FIELDS = {
    "classifier_dropout": None,
    "output_past": True,
    "position_embedding_type": "absolute",
    "use_cache": True,
}


def export_hf_folder(state: Mapping[str, Tensor], source: str, out: str | Path) -> dict[str, float]:
    """Write the weights `state` (keys of an M3Model) as a folder `out`; `source`, where training began, gives config, tokenizer and pooler.

    Returns:
        The largest difference per head between the folder, read back, and the weights in memory.

    Raises:
        CheckpointError: `out` exists, the weights are of another model, or the folder read back differs; no folder stays behind.
    """
    out = Path(out)
    if out.exists():
        raise CheckpointError("export", str(out), "exists already", "remove it or choose another name")
    model = model_from_state(state, source)
    aside = out.with_name(f".{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write_hf_folder(aside, model, Path(source))
        differences = verify_folder(aside, model, source)
        aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return differences


def write_hf_folder(out: Path, model: M3Model, source: Path) -> None:
    """All files of the layout into the empty folder `out`, unchecked (see `export_hf_folder`)."""
    config = model.encoder.config
    max_tokens = min(max_text_tokens(config), load_tokenizer_of(str(source)).model_max_length)
    _write_json(
        out / "config.json",
        published_config(json.loads((source / "config.json").read_text()), type(model.encoder).__name__),
    )
    weights = {
        name: tensor.detach().cpu().float().contiguous()
        for name, tensor in model.encoder.state_dict().items()
    }
    save_file({**weights, **read_pooler(source)}, out / "model.safetensors", metadata={"format": "pt"})
    for file, head in ((LEXICAL_FILE, model.lexical_head), (MULTI_VECTOR_FILE, model.multi_vector_head)):
        torch.save(
            {name: tensor.detach().cpu().float().clone() for name, tensor in head.state_dict().items()},
            out / file,
        )
    write_tokenizer_files(source, out, max_tokens)
    write_sentence_transformers_files(out, config.hidden_size, max_tokens)
    width = model.multi_vector_head.out_features
    own = {
        "megam3_version": __version__,
        "multi_vector_dim": width,
        "max_tokens": max_tokens,
        "special_ids": list(model.special_ids),
    }
    _write_json(out / "megam3_config.json", own)
    (out / "README.md").write_text(_readme(width, config.hidden_size, max_tokens), encoding="utf-8")


def published_config(config: dict, architecture: str) -> dict:
    """The source's config.json as released models have it: class named, and `torch_dtype`, since `dtype` is unknown to older readers."""
    kept = {
        key: value
        for key, value in config.items()
        if key not in ("dtype", "transformers_version", "_name_or_path")
    }
    defaults = _PUBLISHED_FIELDS if config["model_type"] != "modernbert" else {}
    return dict(
        sorted({**defaults, **kept, "architectures": [architecture], "torch_dtype": "float32"}.items())
    )


def read_pooler(source: Path) -> dict[str, Tensor]:
    """`pooler.*` of the source's weights, if any: never trained here, but other readers start a missing one at random."""
    pattern = re.compile(r"^(?:[a-z_]+\.)?(pooler\..+)$")
    found: dict[str, Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            found |= {
                match[1]: weights.get_tensor(key) for key in weights.keys() if (match := pattern.match(key))
            }  # noqa: SIM118
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
    """The folder a run's model came from: `model.path` in the recipe of the run that `checkpoint` (RUN/checkpoints/STEP) belongs to.

    When that folder is gone, or the checkpoint was moved out of its run, the checkpoint's own `model/`: config and tokenizer, no pooler.

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


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _readme(width: int, hidden_size: int, max_tokens: int) -> str:
    option = "" if width == hidden_size else f", colbert_dim={width}"
    note = (
        ""
        if width == hidden_size
        else f"\nThe multi-vector head has {width} dimensions: FlagEmbedding must be told so (`colbert_dim={width}`).\n"
    )
    return f"""---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---
# An M3 retriever (dense, lexical, multi-vector), up to {max_tokens} tokens, trained with megam3 {__version__}

    from megam3.embedder import M3Embedder
    M3Embedder(FOLDER).encode(["a text"])                                   # all three heads

    from FlagEmbedding import BGEM3FlagModel
    BGEM3FlagModel(FOLDER{option}).encode(["a text"], return_dense=True, return_sparse=True, return_colbert_vecs=True)

    from sentence_transformers import SentenceTransformer
    SentenceTransformer(FOLDER).encode(["a text"])                          # the dense head
{note}"""
