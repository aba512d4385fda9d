"""What a run folder says of its run: the recipe, DeepSpeed's dictionary, the environment, the model's small
files.

    RUN/recipe.yaml       the resolved recipe: every field, defaults written out
    RUN/ds_config.json    the dictionary DeepSpeed got
    RUN/env.json          git revision, versions, devices, ranks
    RUN/model/            config.json, tokenizer files and what says how the model is read, which each
                          checkpoint copies

Each file appears whole or not at all; a run that continues writes them anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from megam3.files import atomic_file, write_json
from megam3.model_files import refuse_links_out

MODEL_FOLDER = "model"
MODEL_FILES = (
    "config.json",
    "megam3_config.json",
    "modules.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
"""With tokenizer*.json: what a Hugging Face folder holds besides weights."""


def describe_run_folder(
    run_dir: str | Path,
    *,
    recipe_text: str,
    ds_config: Mapping[str, object],
    environment: Mapping[str, object],
    model_path: str | Path,
) -> Path:
    """Write the files above; returns `RUN/model`. Main rank only.

    Raises:
        OSError: the folder cannot be written, or `model_path` cannot be read.
    """
    run_dir = Path(run_dir)
    model_dir = run_dir / MODEL_FOLDER
    model_dir.mkdir(parents=True, exist_ok=True)
    copy_model_files(model_path, model_dir)
    with atomic_file(run_dir / "recipe.yaml", "w") as stream:
        stream.write(recipe_text)
    write_json(run_dir / "ds_config.json", ds_config)
    write_json(run_dir / "env.json", environment)
    return model_dir


def copy_model_files(source: str | Path, out: str | Path) -> None:
    """Copy what a Hugging Face folder holds besides weights; the content of links, not the links.

    Also replaces files of another model: a run may continue after its encoder's tokenizer files were
    rewritten.
    """
    refuse_links_out(source)
    for name in (*sorted(os.listdir(source)), *_module_configs(Path(source))):
        if is_model_file(name):
            (Path(out) / name).parent.mkdir(exist_ok=True)
            with open(Path(source) / name, "rb") as content, atomic_file(Path(out) / name) as stream:
                shutil.copyfileobj(content, stream)


def _module_configs(source: Path) -> list[str]:
    """`1_Pooling/config.json` and the like: how the model pools, and what its multi-vector layers are."""
    return sorted(str(file.relative_to(source)) for file in source.glob("[0-9]*_*/config.json"))


def is_model_file(name: str) -> bool:
    """Whether a file of a Hugging Face folder is copied into run folder and checkpoints.

    >>> [is_model_file(name) for name in ("config.json", "tokenizer_config.json", "model.safetensors")]
    [True, True, False]
    """
    is_tokenizer = name.startswith("tokenizer") and name.endswith(".json")
    return is_tokenizer or name in MODEL_FILES or name.endswith("/config.json")
