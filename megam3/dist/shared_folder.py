"""Whether all ranks see the same folder, found out at the start instead of at the first resume.

A run folder on a node's own disk looks right to every rank: each writes its part of a checkpoint into a
folder of that name, and only a later resume finds that the parts never met. So rank 0 writes a number that
nobody can know, and every rank has to read it.
"""

import os
import secrets
import socket
import time
from pathlib import Path

from megam3.dist import comm
from megam3.errors import ConfigError

PATIENCE_SECONDS = 60.0
"""How long a rank looks again: a network file system may show a new file to other machines late (NFS: up to
60 s by default)."""


def check_shared(
    folder: str | Path, field: str = "output_dir", patience_seconds: float = PATIENCE_SECONDS
) -> None:
    """Make `folder`, and check that what rank 0 writes into it reaches every rank; collective, leaves no
    file.

    Args:
        field: the recipe's field to name.
        patience_seconds: of a rank that does not see the file yet.

    Raises:
        ConfigError: on every rank alike; names the machines that see another folder, or why rank 0 cannot
        write.
    """
    if not comm.is_grouped():
        return
    folder = Path(folder).absolute()
    nonce, fault = _write(folder) if comm.is_main() else ("", "")
    nonce, fault = comm.gather_objects_json([nonce, fault])[0]
    if fault:
        raise ConfigError(
            field, str(folder), f"rank 0 cannot write there ({fault})", "give a folder that can be written"
        )
    seen = _reads(folder / _name(nonce), nonce, patience_seconds)
    answers = comm.gather_objects_json([socket.gethostname(), seen])
    if comm.is_main():
        (folder / _name(nonce)).unlink(missing_ok=True)
    blind = [(rank, host) for rank, (host, is_seen) in enumerate(answers) if not is_seen]
    if blind:
        hosts = ", ".join(sorted({host for _, host in blind}))
        who = f"{len(blind)} of {len(answers)} ranks (on {hosts})"
        rule = f"{who} do not see what rank 0 ({answers[0][0]}) writes there"
        remedy = "give a folder on a file system that all nodes share"
        raise ConfigError(field, str(folder), rule, remedy)


def _name(nonce: str) -> str:
    return f".shared-by-all-ranks-{nonce[:8]}"


def _write(folder: Path) -> tuple[str, str]:
    """The number written, and what went wrong instead."""
    nonce = secrets.token_hex(16)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / _name(nonce), "w", encoding="ascii") as stream:
            stream.write(nonce)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return nonce, str(error)
    return nonce, ""


def _reads(path: Path, nonce: str, patience_seconds: float) -> bool:
    deadline = time.monotonic() + patience_seconds
    while True:
        try:
            # listing first makes an NFS client ask its server again
            os.listdir(path.parent)
            if path.read_text(encoding="ascii") == nonce:
                return True
        except OSError:
            pass
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.1)
