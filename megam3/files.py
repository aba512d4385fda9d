"""Files and folders that appear whole or not at all, and JSON: the one way to write what others read.

    with atomic_file(path) as stream: ...      path.HOST-PID-THREAD.tmp is written, flushed, then renamed
    with atomic_folder(path) as aside: ...     .path.partial is filled, flushed, then renamed
    write_json(path, value)                    the same for one JSON document

A process killed in between leaves the temporary name behind and never a half file under the final one.
`durable=True` also flushes the parent folder, so that the new name survives a power loss; it costs one disk
flush a call.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_DIGEST_BLOCK_BYTES = 1 << 20
_ABANDONED_SECONDS = 24 * 3600.0


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb", *, durable: bool = True) -> Iterator[IO[Any]]:
    """A stream whose content gets the name `path` if the block raises nothing; `mode` is wb or w (UTF-8)."""
    # two threads may write the same file at once, a heartbeat and the loop for one
    aside = Path(f"{path}.{socket.gethostname()}-{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if durable:
        flush_folder(Path(path).parent)


def is_abandoned(aside: Path) -> bool:
    """Whether a temporary file of `atomic_file` belongs to nobody any more: only such a file may be deleted.

    Its process has ended, when that was on this host; of another host's process nothing is known, so its file
    must be older than a day. Files named otherwise are not ours.
    """
    named = re.fullmatch(r".+\.(?P<host>[^/]+)-(?P<pid>\d+)-(?P<thread>\d+)\.tmp", aside.name)
    if named is None:
        return False
    if not aside.name.endswith(f".{socket.gethostname()}-{named['pid']}-{named['thread']}.tmp"):
        with contextlib.suppress(OSError):
            return time.time() - aside.stat().st_mtime > _ABANDONED_SECONDS
        return False
    try:
        # the state follows the name in brackets; a zombie (Z) has ended and only waits for its parent
        return Path(f"/proc/{named['pid']}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return Path("/proc/self/stat").exists()  # without /proc nothing is known of any process


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder beside `path` that gets its name when the block ends without an exception.

    The caller decides what an existing `path` means; renaming onto a folder that is not empty raises OSError.
    """
    final = Path(path)
    aside = final.with_name(f".{final.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        permit_as_umask_does(aside)
        flush_tree(aside)
        aside.rename(final)
        flush_folder(final.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def permit_as_umask_does(folder: Path) -> None:
    """Let others read what the umask lets them read: safetensors makes files that only their owner can."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o777 | 0o666 & ~mask)


def deny_writing_to_others() -> None:
    """From now on this process, and what it starts, makes no file or folder that everybody may write to,
    whatever its umask was; a group keeps what the umask gives it."""
    os.umask(os.umask(0o077) | 0o002)


def write_json(path: str | Path, value: object, *, durable: bool = True) -> None:
    """`value` as indented UTF-8 JSON under `path`, written aside first. Keys keep their order."""
    with atomic_file(path, "w", durable=durable) as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False)
        stream.write("\n")


def read_json(path: str | Path) -> Any:
    """The JSON document in `path`; OSError and ValueError are the caller's to explain."""
    return parse_json(Path(path).read_text(encoding="utf-8"))


def parse_json(text: str | bytes, **options: Any) -> Any:
    """`json.loads` whose every failure is a ValueError: a hundred thousand opening brackets exhaust the
    parser's stack, which is a RecursionError otherwise and no fault of the caller's."""
    try:
        return json.loads(text, **options)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def folder_name(folder: str | Path) -> str:
    """A folder's own name, also of `.`: what the results of a test set are filed under."""
    return os.path.basename(os.path.abspath(folder))


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    hasher = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(_DIGEST_BLOCK_BYTES):
            hasher.update(block)
    return hasher.hexdigest()


def flush_folder(folder: str | Path) -> None:
    """Force a folder's entries (names, renames) to disk; fsync of a file alone does not cover its name."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(folder: str | Path) -> None:
    """Force every file and folder below `folder` to disk, children before parents."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            with open(os.path.join(parent, name), "rb") as stream:
                os.fsync(stream.fileno())
        flush_folder(parent)
