"""Whether all ranks of a run see the same folder, asked before anything depends on it."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from megam3.dist import comm
from megam3.errors import ConfigError

PATIENCE_SECONDS = 20.0
"""A network file system may show a new name late: NFS keeps what it knows of a folder for up to a minute, by
default 3 to 30 s.
"""


def check_shared(
    folder: str | Path, field: str = "output_dir", *, patience_seconds: float = PATIENCE_SECONDS
) -> None:
    """The main rank leaves a file with a random name, every rank looks for it; collective. Makes the folder.

    Raises:
        ConfigError: on every rank, when a rank does not see it; names ranks and hosts.
    """
    token = os.urandom(8).hex() if comm.is_main() else ""
    token = comm.gather_objects_json(token)[0]
    path = Path(folder) / f".seen-by-all-{token}"
    failure = _leave(path) if comm.is_main() else None
    # the gather is also the barrier after which the file is there
    failure = comm.gather_objects_json(failure)[0]
    if failure is not None:
        raise ConfigError(
            field, str(folder), f"cannot be written ({failure})", "name a folder this account may write"
        )
    seen = comm.gather_objects_json([socket.gethostname(), _appears(path, patience_seconds)])
    if comm.is_main():
        path.unlink(missing_ok=True)
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(seen) if not sees]
    if blind:
        more = f" and {len(blind) - 4} more" if len(blind) > 4 else ""
        who = f"{', '.join(blind[:4])}{more}"
        rule = f"is not one folder for all ranks: what rank 0 on {seen[0][0]} writes is not seen by {who}"
        raise ConfigError(field, str(folder), rule, "name a folder on a file system that all nodes mount")


def _leave(path: Path) -> str | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        return str(error)
    return None


def _appears(path: Path, patience_seconds: float) -> bool:
    end = time.monotonic() + patience_seconds
    while True:
        try:
            # listing a folder makes NFS ask again, where a remembered "no such file" would be repeated
            if path.name in os.listdir(path.parent):
                return True
        except OSError:
            pass
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
