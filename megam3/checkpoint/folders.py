"""The folders below a run's `checkpoints/` as files: which there are, which are whole, which may go.

    checkpoints/
      step-000500/            manifest.json: size and CRC-32 of every file; COMPLETE: the manifest's own
      .step-001000.partial    being written, or left by a kill; cleared before a save and at a start
      step-000250.damaged-1   found broken: kept for a person, never counted, never read again
      step-001500.later-1     newer than the step that train.resume_step went back to

Only names of the form step-N are checkpoints; whatever else lies there (step-000004.bak) is left alone.
No ranks and no tensors here.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import stat
import time
import zlib
from collections.abc import Collection, Mapping
from typing import TypedDict

from megam3.errors import CheckpointError
from megam3.files import atomic_file, flush_folder, read_json, write_json

logger = logging.getLogger(__name__)

MANIFEST, MARKER = "manifest.json", "COMPLETE"
STEP_NAME = re.compile(r"step-(\d{1,18})")
CHUNK_BYTES = 1 << 24
RETRY_SECONDS = (0.5, 2.0)
"""Before a folder is read again that could not be read."""
SPACE_MARGIN = 1.05
"""A checkpoint's size changes little from one to the next: only tokens and counters in state.json grow."""

# what a damaged file system or a foreign file can raise while a folder is read: each is "a problem", none
# ends the search
READ_ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


class FileEntry(TypedDict):
    """One file in a manifest."""

    bytes: int
    crc32: int


def step_name(step: int) -> str:
    """The folder name of a step."""
    return f"step-{step:06d}"


def step_of(name: str) -> int:
    """The step of a folder name that `step_names` returned."""
    match = STEP_NAME.fullmatch(name)
    assert match, name
    return int(match.group(1))


def step_names(root: str) -> list[str]:
    """Names of the checkpoints in a folder, whole or not, oldest step first; none when the folder is
    missing.
    """
    names = os.listdir(root) if os.path.isdir(root) else []
    return sorted((name for name in names if STEP_NAME.fullmatch(name)), key=step_of)


def describe_file(path: str) -> FileEntry:
    """Size and CRC-32 of a file, read in blocks."""
    crc = 0
    with open(path, "rb") as stream:
        while block := stream.read(CHUNK_BYTES):
            crc = zlib.crc32(block, crc)
    return {"bytes": os.path.getsize(path), "crc32": crc}


def files_below(folder: str) -> list[str]:
    """Paths of all files below a folder but hidden ones, relative to it, sorted."""
    return sorted(
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    )


def seal(folder: str, entries: Mapping[str, FileEntry]) -> None:
    """Write manifest, then marker, each flushed to disk with its name: a folder with the marker has
    everything below it.
    """
    manifest = os.path.join(folder, MANIFEST)
    write_json(manifest, dict(sorted(entries.items())))
    with atomic_file(os.path.join(folder, MARKER), "w") as stream:
        stream.write(str(describe_file(manifest)["crc32"]))


def publish(partial: str, final: str) -> str | None:
    """Give a sealed folder its name, durably, and let `latest` name it; returns where an older folder of that
    name went, if any.
    """
    root, name = os.path.split(final)
    aside = rename_aside(root, name, "damaged") if os.path.lexists(final) else None
    os.rename(partial, final)
    flush_folder(root)
    with atomic_file(os.path.join(root, "latest"), "w") as stream:
        stream.write(name)
    return aside


def find_problem(folder: str, share: int = 0, num_shares: int = 1, *, read: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when every file is there with its size and
    checksum.

    Never raises: an error of the file system and foreign bytes in any of the files are problems like others.
    One of the file system may pass, as EIO and ESTALE do on a network: it counts when it comes again and
    again.

    Args:
        folder: of one checkpoint.
        share, num_shares: of several callers that divide the reading, each looks at every num_shares-th file.
        read: False compares names and sizes only, which costs no reading.
    """
    for pause in (*RETRY_SECONDS, None):
        try:
            return _find_problem(folder, share, num_shares, read)
        except READ_ERRORS as error:
            problem = f"cannot be read: {type(error).__name__}: {error}"
            if pause is None or not isinstance(error, OSError):
                break
        time.sleep(pause)
    return problem


def _find_problem(folder: str, share: int, num_shares: int, read: bool) -> str | None:
    marker, manifest = os.path.join(folder, MARKER), os.path.join(folder, MANIFEST)
    if not _is_file(marker) or not _is_file(manifest):
        return "never completed"
    with open(marker, "rb") as stream:
        if stream.read(64).strip() != str(describe_file(manifest)["crc32"]).encode():
            return f"{MANIFEST} was changed"
    for file, entry in list(read_json(manifest).items())[share::num_shares]:
        path = os.path.join(folder, file)
        if not _is_file(path):
            return f"{file} is missing"
        if os.path.getsize(path) != entry["bytes"] or (read and describe_file(path) != entry):
            return f"{file} was changed after writing"
    return None


def _is_file(path: str) -> bool:
    """As `os.path.isfile`, which takes a disk that does not answer for a file that is not there."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise


def rename_aside(root: str, name: str, why: str) -> str:
    """Rename root/name to the first free root/name.WHY-N, so that nothing counts, reads or deletes it;
    returns the new path.
    """
    number = 1
    while os.path.lexists(os.path.join(root, f"{name}.{why}-{number}")):
        number += 1
    aside = os.path.join(root, f"{name}.{why}-{number}")
    os.rename(os.path.join(root, name), aside)
    return aside


def prune(root: str, keep: int, protected: Collection[int]) -> list[str]:
    """Remove all but the newest `keep` checkpoints that are whole by names and sizes; returns what was
    removed.

    Damaged ones are set aside and count for nothing. `protected` steps stay on top of the `keep`.

    Raises:
        OSError: a folder cannot be renamed or removed.
    """
    whole, doomed = 0, []
    for name in reversed(step_names(root)):
        is_protected = step_of(name) in protected
        if is_protected and whole >= keep:
            continue  # stays, whole or not: no need to look at its files, which are as many as the ranks
        if find_problem(os.path.join(root, name), read=False) is not None:
            if not is_protected:
                rename_aside(root, name, "damaged")
            continue
        if whole >= keep:
            doomed.append(name)
        whole += 1
    doomed.reverse()
    for name in doomed:
        # renamed first: a kill in the middle must not leave a checkpoint that looks whole but for a few files
        partial = os.path.join(root, f".{name}.partial")
        os.rename(os.path.join(root, name), partial)
        shutil.rmtree(partial)
    return doomed


def remove_partials(root: str) -> None:
    """Delete what killed saves and killed deletions left. What cannot go costs space and nothing else: on NFS
    the files of a removed checkpoint that another process of this machine has open stay until it closes
    them."""
    for name in os.listdir(root) if os.path.isdir(root) else []:
        if name.startswith(".step-") and name.endswith(".partial"):
            try:
                shutil.rmtree(os.path.join(root, name))
            except OSError as error:
                logger.warning("%s cannot be removed: %s", os.path.join(root, name), error)


def check_space(root: str, at_least_bytes: int = 0) -> None:
    """Refuse to begin a checkpoint that will not fit; its size is that of the newest one there, or
    `at_least_bytes`.

    Raises:
        CheckpointError: the disk has less room.
    """
    names = step_names(root)
    newest = os.path.join(root, names[-1]) if names else None
    newest_bytes = (
        sum(os.path.getsize(os.path.join(newest, file)) for file in files_below(newest)) if newest else 0
    )
    needed, free = int(max(newest_bytes, at_least_bytes) * SPACE_MARGIN), shutil.disk_usage(root).free
    if free < needed:
        have = f"its disk has {free / 2**20:,.0f} MiB free"
        rule = f"the next checkpoint needs {needed / 2**20:,.0f} MiB, and {have}"
        remedy = (
            "free space or lower train.keep_checkpoints, then start again: the newest checkpoint is whole"
        )
        raise CheckpointError("output_dir", root, rule, remedy)
