"""A model by path or by Hugging Face id: folders are used as they stand, ids are downloaded at one fixed
revision.

    resolve_model("models/encoder")             the folder, no revision
    resolve_model("BAAI/bge-m3")                the hub's main branch, whatever commit that is now
    resolve_model("BAAI/bge-m3@5617a9f")        this revision

One attempt: without a network the answer comes after one failed request, not after every file's own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from megam3.config.schema import RunConfig
from megam3.errors import ConfigError

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?$")
# not the other frameworks' weights, which double the download
_SMALL_PATTERNS = ("*.json", "*.txt", "*.model", "*.pt")
_PATTERNS = (*_SMALL_PATTERNS, "*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model lies, and which revision of the hub it is."""

    folder: str
    revision: str | None
    """Commit of the hub, for env.json; None for a local folder."""


def is_hub_id(name: str) -> bool:
    """Whether this is `owner/name` or `owner/name@revision`, and not a path.

    >>> is_hub_id("BAAI/bge-m3@5617a9f"), is_hub_id("./models/encoder"), is_hub_id("encoder")
    (True, False, False)
    """
    return bool(_HUB_ID.match(name))


def hub_source(folder: str | Path) -> dict[str, str] | None:
    """Repository and commit that a folder of the hub's cache holds; None for any other folder.

    >>> hub_source("/home/me/.cache/huggingface/hub/models--BAAI--bge-m3/snapshots/5617a9f")
    {'repository': 'BAAI/bge-m3', 'revision': '5617a9f'}
    """
    place = Path(folder)
    kind, _, name = place.parent.parent.name.partition("--")
    if kind != "models" or place.parent.name != "snapshots":
        return None
    return {"repository": name.replace("--", "/", 1), "revision": place.name}


def resolve_model(path_or_id: str, *, weights: bool = True) -> ResolvedModel:
    """The local folder of `path_or_id`, downloaded when it is a hub id (`owner/name` or
    `owner/name@revision`); `weights=False` leaves the encoder's weights out, for whoever reads its sizes.

    Raises:
        ConfigError: neither a folder nor an id, an id the hub does not have, or no network and no copy.
    """
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return ResolvedModel(str(folder), None)
    if not is_hub_id(path_or_id):
        remedy = "give a local folder, or a hub id of the form owner/name"
        raise ConfigError("model", path_or_id, "no such folder", remedy)
    name, _, revision = path_or_id.partition("@")
    try:
        patterns = list(_PATTERNS if weights else _SMALL_PATTERNS)
        snapshot = snapshot_download(name, revision=revision or None, allow_patterns=patterns)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        rule = f"no such folder, and the hub does not give it ({type(error).__name__})"
        remedy = "correct the name or revision, or log in with `hf auth login` if it is private"
        raise ConfigError("model", path_or_id, rule, remedy) from None
    except Exception as error:  # each HTTP library under huggingface_hub has connection errors of its own
        rule = f"no such folder, and the hub cannot be reached ({type(error).__name__})"
        remedy = "check the network, or download it elsewhere and give its folder"
        raise ConfigError("model", path_or_id, rule, remedy) from None
    # the cache names a snapshot's folder by its commit
    return ResolvedModel(str(snapshot), Path(snapshot).name)


def with_local_model(config: RunConfig, *, weights: bool = True) -> RunConfig:
    """The recipe with `model.path` as a folder: checks and training read its files, and the folder of a hub's
    snapshot names the commit, so that a run continues from the same weights. `weights`: see `resolve_model`.

    Raises:
        ConfigError: see `resolve_model`.
    """
    path = config.model.path
    if Path(path).expanduser().is_dir() or not is_hub_id(path):
        return config
    model = config.model.model_copy(update={"path": resolve_model(path, weights=weights).folder})
    return config.model_copy(update={"model": model})


def push_folder(folder: str | Path, repository: str) -> str:
    """Upload `folder` to the hub repository `owner/name`, made private when new; returns its address.

    Raises:
        ConfigError: not of that form, not allowed, or no network.
    """
    if not _HUB_ID.match(repository) or "@" in repository:
        raise ConfigError("push", repository, "is no hub repository", "write it as owner/name")
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=str(folder))
    except HfHubHTTPError as error:
        rule = f"the hub refused it ({str(error).splitlines()[0]})"
        raise ConfigError("push", repository, rule, "log in with `hf auth login`") from None
    except Exception as error:  # see resolve_model
        rule = f"the hub cannot be reached ({type(error).__name__})"
        remedy = f"{folder} is complete; upload it where there is a network"
        raise ConfigError("push", repository, rule, remedy) from None
    return str(done)
