"""Checkpoints on disk: visible only when complete, verified when read, never unpickled.

    checkpoints/
      step-000500/        engine/…        DeepSpeed's files, one per rank
                          state.json      progress, world size, ZeRO stage, fingerprints of data and model
                          model/…         config.json and tokenizer: with them an exporter needs no other folder
                          manifest.json   size and CRC-32 of every file above
                          COMPLETE        the manifest's own CRC-32; written last
      latest              name of the newest complete one

Writing happens in `.step-000500.partial`; a rename makes it visible. A killed run leaves a partial folder, which the next save removes.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from torch import Tensor

from megam3.batch import Progress
from megam3.dist import comm
from megam3.engine.consolidate import consolidate
from megam3.errors import CheckpointError

CHUNK_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a run needs to know of a checkpoint before it touches the weights."""

    progress: Progress
    world_size: int
    zero_stage: int
    model_signature: str
    """Hash of every parameter's name and shape."""
    data_fingerprint: str
    """Hashes of tokenizer, data and plan; equal fingerprints serve equal batches."""
    layout: str = ""
    """What decides how weights and moments are cut into files: ranks, DeepSpeed's ZeRO section, precision."""
    recipe: dict = field(default_factory=dict)
    """The resolved recipe that wrote it."""


def save_checkpoint(
    run_dir: str, state: RunState, write: Callable[[str], None], model_files: str, keep: int
) -> str:
    """Write one checkpoint; collective. Returns its folder.

    `write(folder)` is called on every rank and writes the rank's own files; `model_files` is copied by the main rank.
    Checksums are taken by all ranks, each its share of the files, then the main rank publishes and prunes all but the newest `keep`.
    """
    name = f"step-{state.progress.step:06d}"
    root = os.path.join(run_dir, "checkpoints")
    partial, final = os.path.join(root, f".{name}.partial"), os.path.join(root, name)
    if comm.is_main():
        os.makedirs(root, exist_ok=True)
        _remove_partials(root)
        os.makedirs(partial)
        shutil.copytree(model_files, os.path.join(partial, "model"))
        _write_json(os.path.join(partial, "state.json"), asdict(state))
    comm.barrier()
    write(partial)
    comm.barrier()
    files = _files(partial)
    mine = {file: _describe(os.path.join(partial, file)) for file in files[comm.rank() :: comm.world_size()]}
    parts = comm.gather_objects_json(mine)
    if comm.is_main():
        _publish(partial, final, {file: entry for part in parts for file, entry in part.items()})
        _prune(root, keep)
    comm.barrier()
    return final


def newest_complete(run_dir: str, report: Callable[[str], None]) -> str | None:
    """The newest checkpoint folder that is whole, or None; each broken one that is passed over is reported (by the main rank).

    Collective: every rank reads its share of the files, and all get the same answer.

    Raises:
        CheckpointError: there are checkpoints, and not one is whole.
    """
    root = os.path.join(run_dir, "checkpoints")
    names = comm.gather_objects_json(sorted(_step_names(root), key=_step_of, reverse=True))[0]
    for name in names:
        found = comm.gather_objects_json(
            find_problem(os.path.join(root, name), comm.rank(), comm.world_size())
        )
        problem = next((each for each in found if each is not None), None)
        if problem is None:
            return os.path.join(root, name)
        if comm.is_main():
            report(f"checkpoint {name} is not usable ({problem}); trying the one before")
    if names:
        raise CheckpointError(
            root,
            names,
            "must hold at least one complete checkpoint",
            "restore one of them, or start anew with train.resume=never",
        )
    return None


def find_problem(folder: str, share: int = 0, num_shares: int = 1) -> str | None:
    """What is wrong with a checkpoint folder, in words; None when every file is there with its size and checksum.

    Of `num_shares` callers that divide the reading, each looks at every num_shares-th file.
    """
    marker, manifest = os.path.join(folder, "COMPLETE"), os.path.join(folder, "manifest.json")
    if not os.path.isfile(marker) or not os.path.isfile(manifest):
        return "never completed"
    with open(marker) as stream:
        if stream.read().strip() != str(_describe(manifest)["crc32"]):
            return "manifest.json was changed"
    with open(manifest) as stream:
        entries = json.load(stream)
    for file, entry in list(entries.items())[share::num_shares]:
        path = os.path.join(folder, file)
        if not os.path.isfile(path):
            return f"{file} is missing"
        if os.path.getsize(path) != entry["bytes"] or _describe(path) != entry:
            return f"{file} was changed after writing"
    return None


def set_aside(run_dir: str) -> str | None:
    """Rename the checkpoints of an earlier run, so that a new one in the same folder neither prunes nor resumes them; returns their place.

    Main rank only. None: there are none.
    """
    root = os.path.join(run_dir, "checkpoints")
    if not _step_names(root):
        return None
    number = 1
    while os.path.exists(f"{root}.before-{number}"):
        number += 1
    os.rename(root, f"{root}.before-{number}")
    return f"{root}.before-{number}"


def read_state(folder: str, *, verify: bool = True) -> RunState:
    """The run state of a complete checkpoint; `verify=False` for what `newest_complete` has just read.

    Raises:
        CheckpointError: `folder` is no checkpoint, or a damaged one.
    """
    problem = find_problem(folder) if verify else None
    if problem is not None:
        raise CheckpointError(
            "checkpoint",
            folder,
            f"must be a complete checkpoint ({problem})",
            "name a folder checkpoints/step-NNNNNN",
        )
    with open(os.path.join(folder, "state.json")) as stream:
        raw = json.load(stream)
    return RunState(**{**raw, "progress": Progress(**raw["progress"])})


def check_resumable(folder: str, saved: RunState, current: RunState) -> None:
    """Refuse to continue another model's checkpoint; another world size or ZeRO stage is no obstacle (see `has_same_layout`).

    Raises:
        CheckpointError: the parameters differ. (The data compares its own fingerprint.)
    """
    was, now = saved.model_signature, current.model_signature
    if was != now:
        rule = f"the checkpoint belongs to parameters of another model (this run has {now!r})"
        remedy = "use the recipe that wrote it, or start anew with train.resume=never"
        raise CheckpointError(f"{folder}: model_signature", was, rule, remedy)


def has_same_layout(saved: RunState, current: RunState) -> bool:
    """Whether each rank can read back the very files it would have written; otherwise states are joined and cut anew, by name."""
    return saved.layout == current.layout


def consolidated_weights(folder: str) -> dict[str, Tensor]:
    """fp32 weights by M3Model parameter name, on the CPU, from a complete checkpoint of any ZeRO stage and world size.

    Raises:
        CheckpointError: the folder is no complete checkpoint.
    """
    read_state(folder)
    return consolidate(folder)


def _publish(partial: str, final: str, entries: dict) -> None:
    manifest = os.path.join(partial, "manifest.json")
    _write_json(manifest, dict(sorted(entries.items())))
    with open(os.path.join(partial, "COMPLETE"), "w") as stream:
        stream.write(str(_describe(manifest)["crc32"]))
        stream.flush()
        os.fsync(stream.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.rename(partial, final)
    latest = os.path.join(os.path.dirname(final), "latest")
    with open(latest + ".partial", "w") as stream:
        stream.write(os.path.basename(final))
    os.replace(latest + ".partial", latest)


def _prune(root: str, keep: int) -> None:
    for name in sorted(_step_names(root), key=_step_of)[:-keep]:
        shutil.rmtree(os.path.join(root, name))


def _remove_partials(root: str) -> None:
    for name in _listdir(root):
        if name.endswith(".partial") and os.path.isdir(os.path.join(root, name)):
            shutil.rmtree(os.path.join(root, name))


def _listdir(folder: str) -> list[str]:
    return os.listdir(folder) if os.path.isdir(folder) else []


def _step_names(root: str) -> list[str]:
    return [name for name in _listdir(root) if name.startswith("step-")]


def _step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def _files(folder: str) -> list[str]:
    return sorted(
        os.path.relpath(os.path.join(root, name), folder)
        for root, _, names in os.walk(folder)
        for name in names
    )


def _describe(path: str) -> dict[str, int]:
    crc = 0
    with open(path, "rb") as stream:
        while block := stream.read(CHUNK_BYTES):
            crc = zlib.crc32(block, crc)
    return {"bytes": os.path.getsize(path), "crc32": crc}


def _write_json(path: str, value: object) -> None:
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
