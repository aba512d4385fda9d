"""Which folder a model's name means: one on this machine, or one of the Hugging Face hub, which is asked
once."""

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download

from megam3.errors import CheckpointError, ConfigError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_UNREAD_FILES = ("onnx/*", "*.onnx", "*.h5", "*.msgpack", "openvino/*", "imgs/*", "*.gguf")
"""Copies of the weights in forms that nothing here reads; bge-m3's repository holds 2 GB of them."""


def model_folder(name: str | Path, revision: str | None = None) -> str:
    """The folder of a model: `name` itself when it is one, else the hub's `owner/name`, downloaded or from
    the cache.

    Raises:
        CheckpointError: neither a folder nor a repository that can be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    remedy = "give the path of a model folder, or the id owner/name of a hub repository"
    if path.is_file():
        raise CheckpointError("model", str(name), "is a file", "give the folder that holds it")
    # without an owner it is no id of today's hub: do not ask anybody about a mistyped path
    if not _HUB_ID.fullmatch(str(name)):
        raise CheckpointError("model", str(name), "is no folder on this machine", remedy)
    try:
        return snapshot_download(str(name), revision=revision, ignore_patterns=list(_UNREAD_FILES))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        rule = f"is no folder on this machine, and the hub did not give it ({reason})"
        raise CheckpointError("model", str(name), rule, remedy) from error


def pick_device(name: str | torch.device | None) -> torch.device:
    """The device of this name; None: CUDA when there is one.

    Raises:
        ConfigError: no such device in this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError("device", str(name), "is no device that torch knows", "use cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        rule = f"this machine has {count} CUDA devices that torch can use"
        raise ConfigError("device", str(name), rule, "use --device cpu, or leave it out")
    return device
