"""Which folder a model's name means: one on this machine, or one of the Hugging Face hub, which is asked
once."""

from pathlib import Path

from megam3.errors import CheckpointError, ConfigError
from megam3.model.hub import is_hub_id, resolve_model


def model_folder(name: str | Path) -> str:
    """The folder of a model: `name` itself when it is one, else the hub's `owner/name` or
    `owner/name@revision`, downloaded or from the cache.

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
    if not is_hub_id(str(name)):
        raise CheckpointError("model", str(name), "is no folder on this machine", remedy)
    try:
        return resolve_model(str(name)).folder
    except ConfigError as error:
        raise CheckpointError("model", str(name), error.rule, error.remedy) from error
