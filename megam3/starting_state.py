"""Where a run starts: at its beginning, or at a checkpoint that fits what is trained now."""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from megam3.batch import Progress
from megam3.checkpoint import (
    RunState,
    check_resumable,
    clear_partials,
    load_weights,
    newest_complete,
    read_rollbacks,
    read_state,
    set_aside,
    was_started_by,
    write_started_by,
)
from megam3.config.difference import recipe_changes
from megam3.config.schema import RunConfig
from megam3.data.dataset import TrainingData
from megam3.data.skips import merge_ranges
from megam3.dist import comm
from megam3.engine.deepspeed import Engine
from megam3.engine.optim import group_layout
from megam3.errors import ConfigError

logger = logging.getLogger(__name__)


def fresh_state(
    config: RunConfig, ds_config: dict, zero_stage: int, signature: str, data_fingerprint: str
) -> RunState:
    """Of a run that begins now."""
    return RunState(
        progress=Progress(),
        world_size=comm.world_size(),
        zero_stage=zero_stage,
        model_signature=signature,
        data_fingerprint=data_fingerprint,
        layout=state_layout(ds_config, group_layout(config.optim)),
        recipe=config.model_dump(mode="json"),
    )


def find_start(
    config: RunConfig,
    run_dir: str,
    engine: Engine,
    data: TrainingData,
    state: RunState,
    total_steps: int,
) -> RunState:
    """`state`, or with the progress of the checkpoint that was loaded. Collective."""
    folder = _choose_checkpoint(config, run_dir)
    if folder is None:
        return state
    saved = read_state(folder, verify=False)
    # on the disk since the moment the run went back, when no checkpoint knew of it yet
    rollbacks = read_rollbacks(run_dir, state.data_fingerprint)
    state = replace(state, skipped=[[entry.first, entry.stop] for entry in rollbacks])
    check_resumable(folder, saved, state)
    if not config.train.resume_with_other_data:
        data.check_fingerprint(saved.data_fingerprint)
    elif saved.data_fingerprint != state.data_fingerprint:
        logger.warning(
            "continuing at step %d on other data, as train.resume_with_other_data asks", saved.progress.step
        )
    check_not_past(config, folder, saved.progress.step, total_steps)
    changes = recipe_changes(saved.recipe, state.recipe)
    for line in changes:
        logger.info("changed since the checkpoint: %s", line)
    if changes and saved.progress.step == total_steps:
        logger.warning(
            "none of these changes is trained: the run is finished, and its recipe.yaml stays as it is; "
            "choose another name, more train.steps, or train.resume=never to begin anew"
        )
    load_weights(engine, folder, saved, state)
    logger.info("resumed from %s", folder)
    kept = saved.skipped if saved.data_fingerprint == state.data_fingerprint else []
    skipped = merge_ranges([*kept, *state.skipped])
    for first, stop in skipped:
        logger.info("steps %d to %d of the plan are left out: the run has gone round them", first + 1, stop)
    return replace(state, progress=saved.progress, skipped=skipped, overflows=saved.overflows)


def _choose_checkpoint(config: RunConfig, run_dir: str) -> str | None:
    """The folder to continue from; None: from the beginning. Collective.

    train.resume=never and train.resume_step hold for a job's first start: after a requeue (same MEGAM3_JOB,
    set by slurm/train.sh) the job continues what it has begun.
    """
    job, settings = os.environ.get("MEGAM3_JOB", ""), config.train
    begins = not comm.any_rank(comm.is_main() and was_started_by(run_dir, job))
    if comm.is_main():
        clear_partials(run_dir)
    if settings.resume == "never" and begins:
        earlier = set_aside(run_dir) if comm.is_main() else None
        if earlier is not None:
            logger.info("train.resume=never: the checkpoints of an earlier run are now in %s", earlier)
        folder = None
    else:
        folder = newest_complete(run_dir, logger.warning, settings.resume_step if begins else None)
    if comm.is_main():
        write_started_by(run_dir, job)
    return folder


def check_not_past(config: RunConfig, folder: str, step: int, total_steps: int) -> None:
    """Refuse a run whose end lies before the checkpoint it would continue from.

    Raises:
        ConfigError: naming train.steps or train.epochs, and the checkpoint.
    """
    if step > total_steps:
        field = "steps" if config.train.steps is not None else "epochs"
        rule = f"ends at step {total_steps}, and the run is at step {step} already ({folder})"
        remedy = f"raise train.{field}, go back with train.resume_step, or begin anew with train.resume=never"
        raise ConfigError(f"train.{field}", getattr(config.train, field), rule, remedy)


def state_layout(ds_config: dict, groups: Sequence[float | None] = ()) -> str:
    """What decides how weights and moments are cut into files; a checkpoint of another layout is joined by
    name. `groups`: what tells parameter groups apart (`group_layout`)."""
    cut = [comm.world_size(), ds_config["zero_optimization"], ds_config["bf16"], *groups]
    return json.dumps(cut, sort_keys=True)


def model_signature(module: nn.Module) -> str:
    """Hash of every parameter's name and full shape, and of which are frozen: those have no moments to go on
    with. Equal for equal architectures at any ZeRO stage."""
    shapes = sorted(
        (name, list(getattr(p, "ds_shape", p.shape)), *([] if p.requires_grad else ["frozen"]))
        for name, p in module.named_parameters()
    )
    return hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16]
