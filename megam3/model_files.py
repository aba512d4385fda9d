"""The small files of a model folder: links that lead out of it, and JSON that is none.

The small files of a model folder (config, tokenizer, vocabulary) are copied into run folders, checkpoints and
exported models, which people publish. A link in a folder from elsewhere, `vocab.txt -> ~/.ssh/id_rsa`,
would carry a file of this machine along. Weights are read as weights, never copied as they are, so a link to
them is nobody's concern.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from megam3.errors import ConfigError
from megam3.files import read_json

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ckpt")


def refuse_links_out(folder: str | Path, field: str = "model.path") -> None:
    """Check every entry of a model folder but its weights, and what lies in its folders (`1_Pooling/`).

    A snapshot of the Hugging Face cache is links into its `blobs/`, which belong to it.

    Raises:
        ConfigError: an entry leads out of the folder; names it and where it leads.
    """
    home = Path(folder).resolve()
    owned = [
        home,
        *(parent.parent / "blobs" for parent in (home, *home.parents) if parent.name == "snapshots"),
    ]
    for path, folders, files in os.walk(home):
        for name in sorted((*folders, *files)):
            entry = Path(path, name)
            if not entry.is_symlink() or name.endswith(WEIGHT_SUFFIXES):
                continue
            target = Path(os.path.realpath(entry))
            if not any(target.is_relative_to(place) for place in owned):
                rule = f"is a link to {target}, outside of the model's folder: runs would copy its content"
                remedy = "if that file belongs to the model, put a copy of it in the link's place"
                raise ConfigError(field, str(entry), rule, remedy)


def read_model_json(file: str | Path) -> Any:
    """The JSON document of a model folder in `file`.

    Raises:
        ConfigError: it cannot be read, is no JSON, or is nested without end.
    """
    try:
        return read_json(file)
    except (OSError, ValueError) as error:
        remedy = "restore the file from the model's source"
        raise ConfigError(str(file), str(error), "is not readable JSON", remedy) from None


def read_model_object(file: str | Path) -> dict[str, Any]:
    """As `read_model_json`, for a file that must hold an object.

    Raises:
        ConfigError: see there, or it holds something else.
    """
    found = read_model_json(file)
    if not isinstance(found, dict):
        remedy = "restore the file from the model's source"
        raise ConfigError(str(file), type(found).__name__, "must hold a JSON object", remedy)
    return found
