"""What a launcher starts, once per rank.

deepspeed --num_gpus 8 --module megam3.train RECIPE [key=value…]
python -m megam3.train RECIPE [key=value…]                          one process
"""

import atexit
import contextlib
import logging
import os
import socket
import sys
import traceback
import types
from dataclasses import replace
from pathlib import Path

from megam3.obs.launcher import remember_launcher
from megam3.obs.stop import EXIT_REQUEUE, EXIT_STOPPED, StopSignal

STOP = StopSignal()
if __name__ == "__main__":
    # the imports below take seconds, in which a signal would kill without a save and a launcher may end
    STOP.__enter__()
    remember_launcher()

from megam3.dist.env import RankInfo, discover_ranks, prepare_environment

prepare_environment(os.environ)  # DeepSpeed picks its accelerator and its build folder while it is imported

import torch

from megam3.build import build
from megam3.cli import USER_ERROR_CODE, print_user_error
from megam3.config.check import check_config
from megam3.config.load import load_config
from megam3.config.schema import RunConfig
from megam3.data.process import WorkerKilledError
from megam3.dist import comm
from megam3.dist.device import choose_device, describe_devices, device_index
from megam3.dist.session import EXIT_LOST_PEER
from megam3.dist.shared_folder import check_shared
from megam3.errors import TrainingError, UserError, refused_path
from megam3.files import deny_writing_to_others
from megam3.model.hub import with_local_model
from megam3.obs.guard import RunGuard
from megam3.obs.health import EXIT_STALLED
from megam3.trainer import train

logger = logging.getLogger(__name__)


COLLECTIVE_TIMEOUT_FACTOR = 1.5

FAULT_FILE_VARIABLE = "MEGAM3_FAULT_FILE"
"""Set by slurm/train.sh: a file that a rank writes its exit code to, when a new start would be in vain."""

EXIT_FAILED = 1
"""Exit code of a rank that met an error nobody expected; its traceback is on stderr."""


def main(argv: list[str] | None = None) -> int:
    """Train one run on this rank; returns the exit code.

    0: finished. 2: bad input. 85: to be started again. 143: stopped by SIGTERM. 1: another rank has ended, or
    an error nobody expected. 128 + N: signal N killed a data worker. A rank among several that fails does not
    return: it says why and leaves at once, without waiting for the others, which may sit in a collective call
    that it will never join (`megam3.dist.comm.leave`).
    """
    arguments = [a for a in (sys.argv[1:] if argv is None else argv) if not a.startswith("--local_rank")]
    rank = int(os.environ.get("RANK", "0"))
    deny_writing_to_others()
    try:
        ranks = discover_ranks(os.environ)
        rank = ranks.rank
        if not arguments:
            raise UserError(
                "recipe",
                None,
                "is required",
                "python -m megam3.train RECIPE [key=value…]; recipes: megam3 show-config --list",
            )
        config = _loaded(arguments[0], arguments[1:], ranks.world_size)
    except UserError as error:
        # found from the command line and the disk alone, so every rank finds the same: one of them says it
        return print_user_error(error) if rank == 0 else USER_ERROR_CODE
    try:
        if __name__ == "__main__":
            code = _train(config, ranks, STOP)
        else:
            with StopSignal() as stop:
                code = _train(config, ranks, stop)
    except Exception as error:
        told = _tell(error, config, ranks)
        _note_fault(error, EXIT_FAILED if told is None else told)
        if told is None:
            print(f"megam3: rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
            comm.leave(EXIT_FAILED)
            raise
        code = told
    if code in (0, EXIT_REQUEUE, EXIT_STOPPED):
        # every rank comes here, so all of them leave the group together
        comm.stop()
    else:
        comm.leave(code)
    return code


def run(recipe: str, *overrides: str) -> Path:
    """Train in this process; returns the run's folder. `megam3.train(…)` is the same.

    Args:
        recipe: a YAML file, or the name of a packaged recipe.
        overrides: `key=value`, as on the command line.

    Raises:
        UserError: bad input, or a signal that ended the run early; the next call continues it.
    """
    ranks = discover_ranks(os.environ)
    config = _loaded(recipe, list(overrides), ranks.world_size)
    # the group stays: DeepSpeed keeps groups made from it and would hand a second run the dead ones
    atexit.register(comm.stop)
    with StopSignal() as stop:
        code = _train(config, ranks, stop)
    if code:
        rule = "was ended by a signal; what it had reached is saved"
        raise TrainingError("run", str(config.run_dir), rule, "call it again to continue")
    return config.run_dir


def _loaded(recipe: str, overrides: list[str], world_size: int) -> RunConfig:
    try:
        config = with_local_model(load_config(recipe, overrides))
        check_config(config, world_size)
    except OSError as error:
        # a path of the recipe that not even can be looked for, such as one of a too long name
        raise refused_path(error, recipe, "name another path") or error from None
    return config


def _tell(error: Exception, config: RunConfig, ranks: RankInfo) -> int | None:
    """Say why this rank ends, where that is no fault of the code; its exit code, or None for a fault."""
    who = f"rank {ranks.rank}: " if ranks.world_size > 1 else ""
    if isinstance(error, OSError):
        remedy = "mend that and start again; the newest checkpoint is whole"
        error = refused_path(error, str(config.run_dir), remedy) or error
    if isinstance(error, UserError):
        code = print_user_error(error, who)
        return EXIT_STALLED if isinstance(error, comm.MeetingError) else code
    if isinstance(error, WorkerKilledError):
        # as if the signal had come to this process, which slurm/train.sh answers with a new start
        print(f"megam3: {who}{error}", file=sys.stderr)
        return 128 + error.number
    if comm.is_lost_peer(error):
        print(f"megam3: {who}another rank has ended; its own message says why", file=sys.stderr)
        return EXIT_LOST_PEER
    if comm.is_timeout(error):
        # a collective gave up before the watchdog did
        print(f"megam3: {who}the other ranks did not answer: {error}", file=sys.stderr)
        return EXIT_STALLED
    return None


def _note_fault(error: Exception, code: int) -> None:
    """Leave `code` where slurm/train.sh looks, when the error would come again at another start.

    On GPUs the peers of this rank are ended from outside, and of all codes srun reports the highest: theirs,
    which is that of a killed rank. A RuntimeError is not noted: it may be what a killed peer looks like from
    here.
    """
    path = os.environ.get(FAULT_FILE_VARIABLE)
    is_own = isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError)
    if path and is_own and code in (USER_ERROR_CODE, EXIT_FAILED):
        with contextlib.suppress(OSError):
            Path(path).write_text(f"{code}\n", encoding="ascii")


def _train(config: RunConfig, ranks: RankInfo, stop: StopSignal) -> int:
    device = choose_device(config.engine.device, ranks.local_rank, os.environ)
    # DeepSpeed takes its device from LOCAL_RANK: both must mean the same one
    replace(ranks, local_rank=device_index(device, ranks.local_rank)).export(os.environ)
    # the watchdog speaks first, and says more than a collective that times out
    timeout_seconds = COLLECTIVE_TIMEOUT_FACTOR * config.train.timeout_seconds
    comm.start(ranks, "nccl" if device.type == "cuda" else "gloo", timeout_seconds)
    share_threads()
    run_dir = str(config.run_dir)
    with RunGuard(run_dir, config.train.timeout_seconds, os.environ) as guard:
        check_shared(run_dir, "output_dir")
        if config.data.store_dir is not None:
            check_shared(config.data.store_dir, "data.store_dir")
        guard.take_folder()
        run = build(config, device, guard)
        for line in describe_devices(device):
            logger.info(line)
        return train(run, stop)


def share_threads() -> None:
    """Split the cores of a machine evenly between its ranks, unless OMP_NUM_THREADS says otherwise;
    collective.

    On GPUs too: DeepSpeed's launcher leaves every rank all cores, and an optimizer whose states are in host
    memory would run ranks × cores threads on them.
    """
    hosts = comm.gather_objects_json(socket.gethostname())
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // hosts.count(socket.gethostname())))


class _CallableModule(types.ModuleType):
    """`from megam3 import train` gives this module, which is imported under that name: calling it trains."""

    def __call__(self, recipe: str, *overrides: str) -> Path:
        """See `run`."""
        return run(recipe, *overrides)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(main())
