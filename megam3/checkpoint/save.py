"""Writing a checkpoint so that a power loss at any moment leaves a whole one; the order is in the package's
docstring.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megam3.checkpoint.folders import (
    FileEntry,
    check_space,
    describe_file,
    files_below,
    prune,
    publish,
    remove_partials,
    seal,
    step_name,
    step_names,
    step_of,
)
from megam3.checkpoint.state import RunState
from megam3.dist import comm
from megam3.dist.shared_folder import check_shared
from megam3.errors import CheckpointError
from megam3.files import flush_folder, flush_tree, write_json

logger = logging.getLogger(__name__)

STALE_SECONDS = 20.0
"""How long a file that another rank wrote may take to appear: what a network file system remembers of a
folder.
"""

TORCH_WRITE_ERRORS = ("inline_container.cc", "iostream error", "PytorchStreamWriter")
"""How torch.save speaks of a disk that takes no more: a RuntimeError of its zip writer, without an errno."""

MAKE_ROOM = "free space or lower train.keep_checkpoints, then start again: the newest checkpoint is whole"


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay. The one just written and the one the run continued from always do."""

    keep: int
    """Newest whole ones."""
    every_steps: int | None = None
    """Besides those, every checkpoint whose step is a multiple of this; None: no more."""
    resumed_step: int | None = None
    """Step the run continued from."""
    best_step: int | None = None
    """Step with the best figure of the metric in train.keep_best."""

    def protects(self, names: Sequence[str], written: int) -> set[int]:
        """Steps that are kept whatever their age."""
        every = [step_of(n) for n in names if self.every_steps and step_of(n) % self.every_steps == 0]
        named = {step for step in (self.resumed_step, self.best_step) if step is not None}
        return {written, *every, *named}


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where one checkpoint is being written."""

    root: str
    """The run's `checkpoints/`."""
    step: int

    @property
    def partial(self) -> str:
        """Folder that is filled."""
        return os.path.join(self.root, f".{step_name(self.step)}.partial")

    @property
    def final(self) -> str:
        """Its name once it is whole."""
        return os.path.join(self.root, step_name(self.step))


@dataclass(frozen=True, kw_only=True)
class OwnFiles:
    """What one rank has of a checkpoint: its files are on the disk, or they are not and here is why."""

    entries: dict[str, FileEntry] = field(default_factory=dict)
    """By path relative to the folder."""
    failure: list[str] | None = None
    """The four parts of a CheckpointError."""


def save_checkpoint(
    run_dir: str,
    state: RunState,
    write: Callable[[str], Sequence[str]],
    model_files: str,
    retention: Retention,
    *,
    fence: Callable[[], None] | None = None,
) -> str:
    """Write one checkpoint while the caller waits; collective. Returns its folder.

    Args:
        run_dir: on a file system that all ranks share.
        state: goes into state.json.
        write: called on every rank with the folder to fill; returns the files this rank wrote, relative to
            it.
        model_files: copied by the main rank.
        retention: what is removed once the new one is on the disk.
        fence: called on the main rank before the new name appears; raises when the run folder belongs to
            another run by now.

    Raises:
        CheckpointError: on every rank, when the disk is full, not shared or not writable, or the fence
            refuses.
    """
    target = begin(run_dir, state, model_files, retention)
    try:
        written = write(target.partial)
    except (OSError, RuntimeError) as error:
        # peers may sit in a collective of `write`: no talk with them here
        raise write_error(target.partial, error) from error
    own = settle(target.partial, written, read_back=retention.keep == 1)
    commit(target, own, retention, fence)
    return target.final


def begin(run_dir: str, state: RunState, model_files: str, retention: Retention) -> Target:
    """Make room and an empty folder with the files of the main rank; collective.

    Raises:
        CheckpointError: on every rank, see `save_checkpoint`.
    """
    target = Target(root=os.path.abspath(os.path.join(run_dir, "checkpoints")), step=state.progress.step)
    _main_rank_does(target.root, lambda: _prepare(target.root, target.partial, state, model_files, retention))
    check_shared(target.partial, patience_seconds=STALE_SECONDS)
    return target


def settle(partial: str, written: Sequence[str], *, read_back: bool = False) -> OwnFiles:
    """Bring the files of this rank to the disk and describe them; no collective, and it never raises.

    Args:
        written: this rank's files, relative to `partial`.
        read_back: read every file once more and compare, because the only other checkpoint is about to go.
    """
    try:
        flush_written(partial, written)
        entries = {file: describe_file(os.path.join(partial, file)) for file in written}
        for file, entry in entries.items() if read_back else ():
            if describe_file(os.path.join(partial, file)) != entry:
                raise OSError(errno.EIO, "other bytes came back than were written", file)
    except OSError as error:
        return OwnFiles(failure=_explain(partial, error))
    return OwnFiles(entries=entries)


def failed(partial: str, error: Exception) -> OwnFiles:
    """What a rank tells the others whose files could not be written."""
    explained = write_error(partial, error)
    if isinstance(explained, CheckpointError):
        return OwnFiles(failure=parts_of(explained))
    return OwnFiles(failure=_explain(partial, f"{type(error).__name__}: {error}"))


def commit(
    target: Target, own: OwnFiles, retention: Retention, fence: Callable[[], None] | None = None
) -> int:
    """Give a checkpoint its name once the files of all ranks are on the disk, then remove what may go;
    collective. Returns its bytes.

    Raises:
        CheckpointError: on every rank alike, when any rank could not write or the fence refuses.
    """
    parts: list[tuple[list[str] | None, dict[str, FileEntry]]]
    parts = comm.gather_objects_json([own.failure, own.entries])
    for rank, (failure, _) in enumerate(parts):
        if failure is not None:
            what, value, rule, remedy = failure
            who = f"rank {rank}: " if len(parts) > 1 else ""
            raise CheckpointError(what, value, f"{who}{rule}", remedy)
    entries = {file: entry for _, found in parts for file, entry in found.items()}
    _main_rank_does(target.root, lambda: _publish(target, entries, fence))
    _main_rank_does(target.root, lambda: _retire(target, retention))
    return sum(entry["bytes"] for entry in entries.values())


def _prepare(root: str, partial: str, state: RunState, model_files: str, retention: Retention) -> None:
    is_new = not os.path.isdir(root)
    os.makedirs(root, exist_ok=True)
    if is_new:
        flush_folder(os.path.dirname(root))
        flush_folder(os.path.dirname(os.path.dirname(root)))
    remove_partials(root)
    _make_space(root, retention)
    os.makedirs(partial)
    shutil.copytree(model_files, os.path.join(partial, "model"))
    write_json(os.path.join(partial, "state.json"), asdict(state))
    flush_tree(os.path.join(partial, "model"))


def _make_space(root: str, retention: Retention) -> None:
    names = step_names(root)
    try:
        check_space(root)
    except CheckpointError:
        # train.keep_checkpoints may have been lowered because the disk is full: what it no longer
        # covers goes first
        if not prune(root, retention.keep, retention.protects(names, step_of(names[-1]) if names else 0)):
            raise
        check_space(root)


def flush_written(folder: str, files: Sequence[str]) -> None:
    """Bring the files this rank wrote to the disk, and the folders with their names.

    Each rank for itself: an fsync on one node says nothing about what another one still holds in memory.
    """
    for file in files:
        with open(os.path.join(folder, file), "rb") as stream:
            os.fsync(stream.fileno())
    for parent in sorted({os.path.dirname(file) for file in files}, reverse=True):
        flush_folder(os.path.join(folder, parent))


def _publish(target: Target, entries: dict[str, FileEntry], fence: Callable[[], None] | None) -> None:
    """The main rank's part. A listing of a folder on a network file system may be old, so the manifest holds
    what each rank says it wrote, and of the main rank's own listing only what nobody claims: model/,
    state.json, and what DeepSpeed writes without saying so (its recovery script).
    """
    partial = target.partial
    for file, entry in entries.items():
        seen = describe_size(os.path.join(partial, file))
        if seen != entry["bytes"]:
            rule = f"the main rank sees {seen} bytes of {file}, the rank that wrote it {entry['bytes']}"
            remedy = "name a folder on a file system that all nodes mount"
            raise CheckpointError("output_dir", partial, rule, remedy)
    unclaimed = [file for file in files_below(partial) if file not in entries]
    flush_written(partial, unclaimed)
    entries.update((file, describe_file(os.path.join(partial, file))) for file in unclaimed)
    seal(partial, entries)
    if fence is not None:
        fence()
    aside = publish(partial, target.final)
    if aside is not None:
        logger.warning("%s was there already and is now %s", target.final, os.path.basename(aside))


def describe_size(path: str, patience_seconds: float = STALE_SECONDS) -> int:
    """Size of a file that may take a while to appear on this node; -1 when it does not."""
    end = time.monotonic() + patience_seconds
    while not os.path.exists(path):
        if time.monotonic() > end:
            return -1
        time.sleep(0.2)
    return os.path.getsize(path)


def _retire(target: Target, retention: Retention) -> None:
    names = step_names(target.root)
    try:
        prune(target.root, retention.keep, retention.protects(names, target.step))
    except OSError as error:
        # the new checkpoint is on the disk; an old one that cannot go costs space and nothing else
        logger.warning("an older checkpoint could not be removed: %s", error)


def _main_rank_does(root: str, work: Callable[[], Any]) -> None:
    """Run `work` on the main rank while the others wait; what it raises is raised on all of them, so that
    nobody waits for ever.
    """
    failure: list[str] | None = None
    if comm.is_main():
        try:
            work()
        except CheckpointError as error:
            failure = parts_of(error)
        except OSError as error:
            failure = _explain(root, error)
    failure = comm.gather_objects_json(failure)[0]
    if failure is not None:
        raise CheckpointError(*failure)


def parts_of(error: CheckpointError) -> list[str]:
    """What travels to the other ranks, which raise the same."""
    return [error.what, str(error.value), error.rule, error.remedy]


def _explain(folder: str, error: OSError | str) -> list[str]:
    remedy = "make the folder writable, or set output_dir"
    # in words: copytree collects the errors of its files in one that has no number
    if any(os.strerror(number) in str(error) for number in (errno.ENOSPC, errno.EDQUOT)):
        remedy = MAKE_ROOM
    return ["output_dir", folder, f"a checkpoint cannot be written: {error}", remedy]


def write_error(partial: str, error: Exception) -> Exception:
    """A full or failing disk in a user's words; any other error, such as a lost peer, as it is."""
    if isinstance(error, OSError):
        return CheckpointError(*_explain(partial, error))
    if not any(word in str(error) for word in TORCH_WRITE_ERRORS):
        return error
    rule, free = str(error).splitlines()[0], shutil.disk_usage(partial).free
    rule = f"a checkpoint cannot be written ({free:,} bytes free): {rule}"
    return CheckpointError("output_dir", partial, rule, MAKE_ROOM)
