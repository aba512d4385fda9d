"""Writing a checkpoint so that a power loss at any moment leaves a whole one; the order is in the package's
docstring.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megam3.checkpoint.folders import (
    FileEntry,
    check_space,
    describe_file,
    files_below,
    find_problem,
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


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Which checkpoints stay. The one just written and the one the run continued from always do."""

    keep: int
    """Newest whole ones."""
    every_steps: int | None = None
    """Besides those, every checkpoint whose step is a multiple of this; None: no more."""
    resumed_step: int | None = None
    """Step the run continued from."""

    def protects(self, names: Sequence[str], written: int) -> set[int]:
        """Steps that are kept whatever their age."""
        every = [step_of(n) for n in names if self.every_steps and step_of(n) % self.every_steps == 0]
        return {written, *every, *([] if self.resumed_step is None else [self.resumed_step])}


def save_checkpoint(
    run_dir: str,
    state: RunState,
    write: Callable[[str], Sequence[str] | None],
    model_files: str,
    retention: Retention,
    *,
    fence: Callable[[], None] | None = None,
) -> str:
    """Write one checkpoint; collective. Returns its folder.

    Args:
        run_dir: on a file system that all ranks share.
        state: goes into state.json.
        write: called on every rank with the folder to fill; returns the files this rank wrote, relative to
            it, or None for all it sees.
        model_files: copied by the main rank.
        retention: what is removed once the new one is on the disk.
        fence: called on the main rank before the new name appears; raises when the run folder belongs to
            another run by now.

    Raises:
        CheckpointError: on every rank, when the disk is full, not shared or not writable, or the fence
            refuses.
    """
    root = os.path.join(run_dir, "checkpoints")
    name = step_name(state.progress.step)
    partial, final = os.path.join(root, f".{name}.partial"), os.path.join(root, name)
    _main_rank_does(root, lambda: _prepare(root, partial, state, model_files, retention))
    check_shared(partial, patience_seconds=STALE_SECONDS)
    try:
        written = write(partial)
        flush_written(partial, written)
        own = files_below(partial) if written is None or comm.is_main() else written
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its zip writer. Peers may sit in a
        # collective of `write`: no talk with them here
        raise _write_error(partial, error) from error
    owners = share_out(comm.gather_objects_json(sorted(own)))
    parts = comm.gather_objects_json(_describe_own(partial, owners, written))
    _main_rank_does(root, lambda: _publish(partial, final, parts, fence))
    is_proved = retention.keep > 1 or _is_readable(final)
    _main_rank_does(root, lambda: _retire(root, state.progress.step, retention, is_proved))
    return final


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


def flush_written(folder: str, files: Sequence[str] | None) -> None:
    """Bring the files this rank wrote to the disk, and the folders with their names; None: everything below
    `folder`.

    Each rank for itself: an fsync on one node says nothing about what another one still holds in memory.
    """
    if files is None:
        flush_tree(folder)
        return
    for file in files:
        with open(os.path.join(folder, file), "rb") as stream:
            os.fsync(stream.fileno())
    for parent in sorted({os.path.dirname(file) for file in files}, reverse=True):
        flush_folder(os.path.join(folder, parent))


def share_out(listings: Sequence[Sequence[str]]) -> dict[str, int]:
    """Every file that any rank saw, with the rank that describes it.

    A listing of a folder on a network file system may be old, so no single rank's listing decides what is in
    the manifest. The main
    rank lists everything it sees and describes only what no other rank claims: whoever wrote a file still has
    it in memory.

    >>> share_out([["a", "b", "c"], ["b", "c"], ["c"]])
    {'a': 0, 'b': 1, 'c': 1}
    """
    seen_by: dict[str, list[int]] = {}
    for rank, files in enumerate(listings):
        for file in files:
            seen_by.setdefault(file, []).append(rank)
    owners = {}
    for index, (file, ranks) in enumerate(sorted(seen_by.items())):
        claims = [rank for rank in ranks if rank != 0] or ranks
        owners[file] = claims[index % len(claims)]
    return owners


def _describe_own(
    partial: str, owners: Mapping[str, int], written: Sequence[str] | None
) -> dict[str, FileEntry]:
    mine = [file for file, rank in owners.items() if rank == comm.rank()]
    try:
        # what the engine wrote without saying so (DeepSpeed's recovery script) is the main rank's to flush
        flush_written(partial, [file for file in mine if written is not None and file not in written])
        return {file: describe(os.path.join(partial, file)) for file in mine}
    except OSError as error:
        raise CheckpointError(*_explain(partial, error)) from None


def describe(path: str, patience_seconds: float = STALE_SECONDS) -> FileEntry:
    """`describe_file` of a file that may take a while to appear on this node."""
    end = time.monotonic() + patience_seconds
    while not os.path.exists(path) and time.monotonic() < end:
        time.sleep(0.2)
    return describe_file(path)


def _publish(
    partial: str, final: str, parts: Sequence[dict[str, FileEntry]], fence: Callable[[], None] | None
) -> None:
    entries = {file: entry for part in parts for file, entry in part.items()}
    for file, entry in entries.items():
        seen = describe_size(os.path.join(partial, file))
        if seen != entry["bytes"]:
            rule = f"the main rank sees {seen} bytes of {file}, the rank that wrote it {entry['bytes']}"
            raise CheckpointError(
                "output_dir", partial, rule, "name a folder on a file system that all nodes mount"
            )
    seal(partial, entries)
    if fence is not None:
        fence()
    aside = publish(partial, final)
    if aside is not None:
        logger.warning("%s was there already and is now %s", final, os.path.basename(aside))


def describe_size(path: str, patience_seconds: float = STALE_SECONDS) -> int:
    """Size of a file that may take a while to appear on this node; -1 when it does not."""
    end = time.monotonic() + patience_seconds
    while not os.path.exists(path):
        if time.monotonic() > end:
            return -1
        time.sleep(0.2)
    return os.path.getsize(path)


def _retire(root: str, written: int, retention: Retention, is_proved: bool) -> None:
    names = step_names(root)
    keep = retention.keep if is_proved else max(retention.keep, 2)
    try:
        prune(root, keep, retention.protects(names, written))
    except OSError as error:
        # the new checkpoint is on the disk; an old one that cannot go costs space and nothing else
        logger.warning("an older checkpoint could not be removed: %s", error)


def _is_readable(folder: str) -> bool:
    """Read a checkpoint back on all ranks together, before the only other one is removed."""
    found = comm.gather_objects_json(find_problem(folder, comm.rank(), comm.world_size()))
    problem = next((each for each in found if each is not None), None)
    if problem is not None and comm.is_main():
        logger.warning("%s cannot be read back (%s); the one before is kept", folder, problem)
    return problem is None


def _main_rank_does(root: str, work: Callable[[], Any]) -> None:
    """Run `work` on the main rank while the others wait; what it raises is raised on all of them, so that
    nobody waits for ever.
    """
    failure: list[str] | None = None
    if comm.is_main():
        try:
            work()
        except CheckpointError as error:
            failure = [error.what, str(error.value), error.rule, error.remedy]
        except OSError as error:
            failure = _explain(root, error)
    failure = comm.gather_objects_json(failure)[0]
    if failure is not None:
        raise CheckpointError(*failure)


def _explain(folder: str, error: OSError) -> list[str]:
    remedy = "make the folder writable, or set output_dir"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        remedy = (
            "free space or lower train.keep_checkpoints, then start again: the newest checkpoint is whole"
        )
    return ["output_dir", folder, f"a checkpoint cannot be written: {error}", remedy]


def _write_error(partial: str, error: OSError | RuntimeError) -> BaseException:
    """A full or failing disk in a user's words; any other RuntimeError, such as a lost peer, as it is."""
    if isinstance(error, OSError):
        return CheckpointError(*_explain(partial, error))
    if not any(word in str(error) for word in TORCH_WRITE_ERRORS):
        return error
    rule, free = str(error).splitlines()[0], shutil.disk_usage(partial).free
    remedy = "free space or lower train.keep_checkpoints, then start again: the newest checkpoint is whole"
    return CheckpointError(
        "output_dir", partial, f"a checkpoint cannot be written ({free:,} bytes free): {rule}", remedy
    )
