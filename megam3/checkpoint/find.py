"""Which checkpoint a run continues from, and what is in it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from torch import Tensor

from megam3.batch import Progress
from megam3.checkpoint.folders import find_problem, remove_partials, rename_aside, step_names, step_of
from megam3.checkpoint.state import RunState, has_same_layout
from megam3.dist import comm
from megam3.engine.consolidate import consolidate
from megam3.engine.deepspeed import Engine
from megam3.errors import CheckpointError
from megam3.files import read_json, write_json

logger = logging.getLogger(__name__)

STARTED_BY = "started-by.json"
"""In a run folder: the job whose train.resume=never or train.resume_step was carried out."""


def newest_complete(run_dir: str, report: Callable[[str], None], step: int | None = None) -> str | None:
    """The newest checkpoint folder that is whole, or None. The main rank reports each broken one.

    Collective: every rank reads its share of the files, and all get the same answer. Broken ones are renamed
    step-N.damaged-1 once a whole one is found. With `step`, that checkpoint and no other; newer ones are
    renamed step-N.later-1, or the next start would take them.

    Raises:
        CheckpointError: there are checkpoints, and not one is whole; or `step` is not there or not whole.
    """
    root = os.path.join(run_dir, "checkpoints")
    # the main rank alone lists the folder: a thousand ranks would ask a shared file system at once
    own = list(reversed(step_names(root))) if comm.is_main() else []
    there = comm.gather_objects_json(own)[0]
    names = [name for name in there if step in (None, step_of(name))]
    broken: list[str] = []
    for name in names:
        folder = os.path.join(root, name)
        found = comm.gather_objects_json(find_problem(folder, comm.rank(), comm.world_size()))
        problem = next((each for each in found if each is not None), None)
        if problem is None:
            later = [n for n in there if step is not None and step_of(n) > step]
            if comm.is_main():
                _rename_all(root, broken, "damaged")
                _rename_all(root, later, "later")
            comm.barrier()
            return folder
        broken.append(name)
        if comm.is_main():
            report(f"checkpoint {name} is not usable ({problem}); trying the one before")
    if step is not None:
        rule = f"must be a whole checkpoint of this run; there are: {', '.join(there) or 'none'}"
        raise CheckpointError("train.resume_step", step, rule, "name one of these steps")
    if names:
        raise CheckpointError(
            root,
            names,
            "must hold at least one complete checkpoint",
            "restore one of them, or start anew with train.resume=never",
        )
    return None


def _rename_all(root: str, names: Sequence[str], why: str) -> None:
    for name in names:
        try:
            rename_aside(root, name, why)
        except OSError as error:
            logger.warning("%s cannot be renamed: %s", os.path.join(root, name), error)


def list_steps(run_dir: str) -> list[int]:
    """Steps of the checkpoints in a run folder, whole or not, oldest first."""
    return [step_of(name) for name in step_names(os.path.join(run_dir, "checkpoints"))]


def was_started_by(run_dir: str, job: str) -> bool:
    """Whether this job has begun this run before: then train.resume=never and train.resume_step are done, and
    a requeue continues. `job` empty: a start by hand, which always means what it says.
    """
    try:
        return bool(job) and read_json(os.path.join(run_dir, STARTED_BY)) == {"job": job}
    except (OSError, ValueError):
        return False


def write_started_by(run_dir: str, job: str) -> None:
    """Note that `job` has set aside or gone back as it was asked to; main rank only."""
    write_json(os.path.join(run_dir, STARTED_BY), {"job": job})


def clear_partials(run_dir: str) -> None:
    """Delete what a killed or a full disk's save left, so that a new start has that space; main rank only."""
    remove_partials(os.path.join(run_dir, "checkpoints"))


def set_aside(run_dir: str) -> str | None:
    """Rename the checkpoints of an earlier run, so that a new one in the same folder neither prunes nor
    resumes them; returns their place.

    Main rank only. None: there are none.
    """
    root = os.path.join(run_dir, "checkpoints")
    if not step_names(root):
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
    try:
        raw = read_json(os.path.join(folder, "state.json"))
        return RunState(**{**raw, "progress": Progress(**raw["progress"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        rule = f"its state.json is not one that this version of megam3 reads ({error})"
        raise CheckpointError("checkpoint", folder, rule, "use the version that wrote it") from None


def check_resumable(folder: str, saved: RunState, current: RunState) -> None:
    """Refuse to continue another model's checkpoint; another world size or ZeRO stage is no obstacle (see
    `has_same_layout`).

    Raises:
        CheckpointError: the parameters differ. (The data compares its own fingerprint.)
    """
    was, now = saved.model_signature, current.model_signature
    if was != now:
        rule = f"the checkpoint belongs to parameters of another model (this run has {now!r})"
        remedy = "use the recipe that wrote it, or start anew with train.resume=never"
        raise CheckpointError(f"{folder}: model_signature", was, rule, remedy)


def load_weights(engine: Engine, folder: str, saved: RunState, current: RunState) -> None:
    """Read weights, moments and AdamW's step count into an engine; collective."""
    if has_same_layout(saved, current):
        engine.load(folder)
        return
    was, now = (f"{s.world_size} ranks at ZeRO stage {s.zero_stage}" for s in (saved, current))
    logger.info(
        "the checkpoint's files were cut otherwise (%s, now %s): joining them by parameter name", was, now
    )
    engine.load_elastic(folder)


def consolidated_weights(folder: str) -> dict[str, Tensor]:
    """fp32 weights by M3Model parameter name, on the CPU, from a complete checkpoint of any ZeRO stage and
    world size.

    Raises:
        CheckpointError: the folder is no complete checkpoint.
    """
    read_state(folder)
    return consolidate(folder)
