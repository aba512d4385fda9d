"""What a run has gone round: written before training goes on, so that a run that is killed afterwards repeats
it.

    checkpoints/rollbacks.json      [{"failed_step": 41, "back_to": 30, "first": 30, "stop": 41, …}]

The places since the checkpoint are skipped, not the failing batch alone: the weights that met it came out of
those steps, and the same steps would lead to the same weights (as in PaLM, arXiv 2204.02311, section 5.1,
where the run restarts before a loss spike and leaves 200 to 500 batches out). The file lies with the
checkpoints, so train.resume=never sets both aside; each checkpoint holds the ranges as well.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass, replace

from megam3.checkpoint.find import list_steps, load_weights, newest_complete, read_state
from megam3.checkpoint.state import RunState
from megam3.data.skips import merge_ranges, place_of
from megam3.dist import comm
from megam3.engine.deepspeed import Engine
from megam3.errors import CheckpointError, TrainingError
from megam3.files import read_json, write_json
from megam3.obs.nonfinite import RollBack, way_back

logger = logging.getLogger(__name__)

FILE = "rollbacks.json"


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """One return to a checkpoint."""

    failed_step: int
    """From 1, as in messages."""
    what: str
    """Rank and figures that were not finite."""
    back_to: int
    """Step of the checkpoint."""
    first: int
    """First place in the plan that is left out, in steps."""
    stop: int
    """First place that is served again."""
    data_fingerprint: str
    """Of the plan that the places belong to."""


def read_rollbacks(run_dir: str, data_fingerprint: str) -> list[Rollback]:
    """The returns of a run on this data, oldest first; those on other data concern another plan.

    Collective: the main rank reads for all. A network file system may show a new file to one rank before
    another, and ranks that go round different places would train on parts of different batches.

    Raises:
        CheckpointError: the file is there and cannot be read: going on would serve other batches.
    """
    path = os.path.join(run_dir, "checkpoints", FILE)
    own: list[dict] = []
    failure = ""
    if comm.is_main():
        try:
            own = [asdict(Rollback(**entry)) for entry in read_json(path)]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, TypeError) as error:
            failure = f"cannot be read ({error})"
    own, failure = comm.gather_objects_json([own, failure])[0]
    if failure:
        raise CheckpointError("rollbacks", path, failure, "restore it, or start anew with train.resume=never")
    found = [Rollback(**entry) for entry in own]
    return [entry for entry in found if entry.data_fingerprint == data_fingerprint]


def skipped_ranges(run_dir: str, data_fingerprint: str) -> list[list[int]]:
    """Places of the plan that a run has gone round so far.

    Raises:
        CheckpointError: see `read_rollbacks`.
    """
    return merge_ranges([(entry.first, entry.stop) for entry in read_rollbacks(run_dir, data_fingerprint)])


def add_rollback(run_dir: str, rollback: Rollback) -> None:
    """Note one more, on the disk when this returns; main rank only."""
    path = os.path.join(run_dir, "checkpoints", FILE)
    before = read_json(path) if os.path.exists(path) else []
    write_json(path, [*before, asdict(rollback)])


def roll_back(run_dir: str, engine: Engine, state: RunState, request: RollBack, limit: int) -> RunState:
    """Load the newest checkpoint and leave out the data since then; collective. Returns where the run stands.

    Args:
        engine: its weights and moments become the checkpoint's.
        state: of the run now; its progress is replaced.
        request: the step that failed.
        limit: returns of a run, all its starts together.

    Raises:
        TrainingError: the limit is reached.
        CheckpointError: no checkpoint is whole.
    """
    failed = request.step + 1
    number = len(read_rollbacks(run_dir, state.data_fingerprint))
    if number >= limit:
        rule = f"is not finite, and the run went back {number} times already (engine.max_rollbacks)"
        raise TrainingError(f"step {failed}", request.what, rule, way_back(list_steps(run_dir)))
    folder = newest_complete(run_dir, logger.warning)
    if folder is None:
        raise TrainingError(f"step {failed}", request.what, "no checkpoint to go back to", way_back([]))
    saved = read_state(folder, verify=False)
    first = place_of(saved.progress.step, state.skipped)
    stop = place_of(request.step, state.skipped) + 1
    note = Rollback(
        failed_step=failed,
        what=request.what,
        back_to=saved.progress.step,
        first=first,
        stop=stop,
        data_fingerprint=state.data_fingerprint,
    )
    if comm.is_main():
        add_rollback(run_dir, note)
    # nobody trains on before the disk has the note: a run killed after this line goes round the same data
    comm.barrier()
    load_weights(engine, folder, saved, state)
    said = "step %d: %s is not finite; back to step %d, and steps %d to %d of the plan are left out"
    if comm.is_main():
        logger.warning(said, failed, request.what, note.back_to, first + 1, stop)
    skipped = merge_ranges([*state.skipped, (first, stop)])
    return replace(state, progress=saved.progress, skipped=skipped, overflows=saved.overflows)
