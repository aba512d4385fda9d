"""Which rank am I, and what does this machine offer? Answered from environment variables, before any process
group exists.

Ranks come from the launcher's variables (deepspeed, torchrun), else from Slurm, else from MPI through mpi4py,
else there is one process.

    RankInfo(rank=3, local_rank=1, world_size=4, master_addr="n0", master_port=29500, source="launcher")
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megam3.errors import ConfigError

DEFAULT_PORT = 29500
LOWEST_PORT = 12_000
PORT_DRAWS = 100
EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
LAUNCHER_VARIABLES = (*RANK_VARIABLES, "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """This process among the processes of the run."""

    rank: int
    local_rank: int
    """Rank among the processes of this node: the device's index."""
    world_size: int
    master_addr: str
    """Host of rank 0."""
    master_port: int
    source: Literal["launcher", "slurm", "mpi", "single"]
    """Where the numbers came from."""

    def export(self, environ: MutableMapping[str, str]) -> None:
        """Write the five launcher variables, so that torch and DeepSpeed see these ranks and do no discovery
        of their own."""
        environ["RANK"], environ["LOCAL_RANK"], environ["WORLD_SIZE"] = (
            str(self.rank),
            str(self.local_rank),
            str(self.world_size),
        )
        environ["MASTER_ADDR"], environ["MASTER_PORT"] = self.master_addr, str(self.master_port)


def discover_ranks(environ: Mapping[str, str]) -> RankInfo:
    """The rank of this process, from the first source that knows it.

    Raises:
        ConfigError: a source is incomplete or holds numbers that cannot be; names the variables.
    """
    if any(name in environ for name in RANK_VARIABLES):
        return _from_launcher(environ)
    if "SLURM_PROCID" in environ and not _is_batch_script(environ):
        return _from_slurm(environ)
    if any(name.startswith(("OMPI_", "PMI_", "PMIX_")) for name in environ):
        return _from_mpi(environ)
    return _checked(
        RankInfo(
            rank=0,
            local_rank=0,
            world_size=1,
            master_addr=environ.get("MASTER_ADDR", "127.0.0.1"),
            master_port=_port(environ, DEFAULT_PORT),
            source="single",
        )
    )


def _from_launcher(environ: Mapping[str, str]) -> RankInfo:
    missing = [name for name in LAUNCHER_VARIABLES if name not in environ]
    if missing:
        given = {name: environ[name] for name in LAUNCHER_VARIABLES if name in environ}
        rule = f"the launcher's variables come together, and {', '.join(missing)} is not set"
        remedy = (
            "start with `deepspeed` or `torchrun`, or unset RANK, WORLD_SIZE and LOCAL_RANK for one process"
        )
        raise ConfigError("environment", given, rule, remedy)
    rank, world_size, local_rank = (_number(environ, name) for name in RANK_VARIABLES)
    return _checked(
        RankInfo(
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            master_addr=environ["MASTER_ADDR"],
            master_port=_port(environ, DEFAULT_PORT),
            source="launcher",
        )
    )


def _is_batch_script(environ: Mapping[str, str]) -> bool:
    # a batch script runs once, on the first node, with SLURM_PROCID=0; only srun starts tasks, and it names
    # its step
    return environ.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in environ


def _from_slurm(environ: Mapping[str, str]) -> RankInfo:
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
    nodes = next(
        (name for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST") if name in environ),
        None,
    )
    missing = [name for name in (tasks, "SLURM_LOCALID") if name not in environ]
    if nodes is None and "MASTER_ADDR" not in environ:
        missing.append("SLURM_JOB_NODELIST")
    if missing:
        rule = f"a Slurm task has more variables than this, and {', '.join(missing)} is not set"
        raise ConfigError(
            "environment",
            {"SLURM_PROCID": environ["SLURM_PROCID"]},
            rule,
            "start with `srun`, or unset SLURM_PROCID",
        )
    master = environ.get("MASTER_ADDR") or first_host(environ[str(nodes)])
    rank, local_rank, world_size = (
        _number(environ, name) for name in ("SLURM_PROCID", "SLURM_LOCALID", tasks)
    )
    return _checked(
        RankInfo(
            rank=rank,
            local_rank=local_rank,
            world_size=world_size,
            master_addr=master,
            master_port=_port(environ, slurm_port(environ)),
            source="slurm",
        )
    )


def slurm_port(environ: Mapping[str, str]) -> int:
    """A port that all tasks of a step agree on and that other steps on the node avoid; below the ephemeral
    range of Linux (32768)."""
    job, step = (
        int(value) if (value := environ.get(name, "0")).isdigit() else 0
        for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")
    )
    return LOWEST_PORT + (job * 10 + step) % 20_000


def free_port() -> int:
    """A port on which nobody on this machine listens now, so that runs started side by side do not meet each
    other's ranks.

    Below those that the system hands out by itself: a rank listens there only seconds later, when its imports
    are done, and meanwhile any connection of anybody's could be given one of these.
    """
    with contextlib.suppress(OSError, ValueError):
        first_handed_out = int(EPHEMERAL_RANGE.read_text().split()[0])
        drawn = random.SystemRandom()  # not the seeded one: runs of one seed would draw the same
        for _ in range(PORT_DRAWS if first_handed_out > 2 * LOWEST_PORT else 0):
            port = drawn.randrange(LOWEST_PORT, first_handed_out)
            with contextlib.suppress(OSError), socket.socket() as probe:
                probe.bind(("", port))
                return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list, without calling Slurm when the list is of the usual form.

    >>> first_host("gpu[07-12,20],cpu1"), first_host("r[1-2]n[3-4]"), first_host("a,b")
    ('gpu07', 'r1n3', 'a')

    Raises:
        ConfigError: not a node list, and `scontrol` cannot expand it either.
    """
    depth, end = 0, len(nodelist)
    for position, letter in enumerate(nodelist):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            end = position
            break
    host = re.sub(r"\[(\w+)(?:-\w+)?(?:,\w+(?:-\w+)?)*\]", r"\1", nodelist[:end].strip())
    if re.fullmatch(r"[\w.-]+", host):
        return host
    return _first_host_by_scontrol(nodelist)


def _first_host_by_scontrol(nodelist: str) -> str:
    try:
        listing = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
        return listing.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        rule, remedy = "cannot be read as a Slurm node list", "set MASTER_ADDR to the host of rank 0"
        raise ConfigError("SLURM_JOB_NODELIST", nodelist, rule, remedy) from None


def _from_mpi(environ: Mapping[str, str]) -> RankInfo:
    # mpi4py's wheel holds one module for each kind of MPI and takes the kind of the first library it finds,
    # which need not be that of the `mpirun` that started us
    abi = "openmpi" if any(name.startswith("OMPI_") for name in environ) else None
    if abi is not None and "MPI4PY_LIBMPI" not in environ:
        os.environ.setdefault("MPI4PY_MPIABI", abi)
    try:
        # imported here and nowhere else: importing it initialises MPI, which needs an MPI library
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        remedy = "load the cluster's MPI module, or start with `deepspeed`, `torchrun` or `srun`"
        raise ConfigError(
            "environment",
            "OMPI_*/PMI_*",
            f"MPI's variables are set but MPI cannot be loaded ({error})",
            remedy,
        ) from None
    world = MPI.COMM_WORLD
    local_rank = world.Split_type(MPI.COMM_TYPE_SHARED).Get_rank()
    master = environ.get("MASTER_ADDR") or world.bcast(MPI.Get_processor_name(), root=0)
    return _checked(
        RankInfo(
            rank=world.Get_rank(),
            local_rank=local_rank,
            world_size=world.Get_size(),
            master_addr=master,
            master_port=_port(environ, DEFAULT_PORT),
            source="mpi",
        )
    )


def _checked(info: RankInfo) -> RankInfo:
    if not 0 <= info.rank < info.world_size:
        remedy = "correct the launcher's variables"
        raise ConfigError(
            "rank",
            info.rank,
            f"must be at least 0 and below the world size {info.world_size} ({info.source})",
            remedy,
        )
    if not 0 <= info.local_rank <= info.rank:
        remedy = "correct the launcher's variables"
        raise ConfigError(
            "local rank",
            info.local_rank,
            f"must be at least 0 and not above the rank {info.rank} ({info.source})",
            remedy,
        )
    return info


def _port(environ: Mapping[str, str], default: int) -> int:
    if "MASTER_PORT" not in environ:
        return default
    port = _number(environ, "MASTER_PORT")
    if not 0 < port < 65_536:
        raise ConfigError("MASTER_PORT", port, "is no port number", "use one from 1024 to 65535")
    return port


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise ConfigError(name, environ[name], "must be a whole number", f"correct or unset {name}") from None


def prepare_environment(environ: MutableMapping[str, str], *, has_gpu: bool | None = None) -> None:
    """Fill in what torch and DeepSpeed read from the environment; call before importing deepspeed. Variables
    already set stay.

    - DS_ACCELERATOR=cpu without a GPU (`has_gpu`; None asks torch), which also spares DeepSpeed's search and
    its warning
    - PYTORCH_ALLOC_CONF=expandable_segments:True with a GPU: packed batches ask for another size every step,
    and blocks of fixed sizes leave gaps that nothing fits into
    - TORCH_EXTENSIONS_DIR, TRITON_CACHE_DIR, HF_HOME and MPLCONFIGDIR in a private writable folder when HOME
    cannot be written
    - PATH ends with the folder of this interpreter: `ninja` lies there when the environment is not activated,
    for ZeRO++'s CUDA kernels
    """
    if not (_torch_sees_gpu() if has_gpu is None else has_gpu):
        environ.setdefault("DS_ACCELERATOR", "cpu")
    # the second is the first one's older name
    elif not environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    if not _is_writable(_home(environ) / ".cache"):
        folder = _private_folder()
        for name, part in (
            ("TORCH_EXTENSIONS_DIR", "torch"),
            ("TRITON_CACHE_DIR", "triton"),
            ("HF_HOME", "hf"),
            ("MPLCONFIGDIR", "plot"),
        ):
            environ.setdefault(name, str(folder / part))
    scripts, path = str(Path(sys.executable).parent), environ.get("PATH", "")
    if scripts not in path.split(os.pathsep):
        environ["PATH"] = os.pathsep.join(part for part in (path, scripts) if part)


def _torch_sees_gpu() -> bool:
    import torch

    return torch.cuda.device_count() > 0 and torch.cuda.is_available()


def _home(environ: Mapping[str, str]) -> Path:
    return Path(environ.get("HOME") or "/nonexistent")


def _is_writable(folder: Path) -> bool:
    # asking for permissions is not enough: root may write anywhere, but not on a read-only mount
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _private_folder() -> Path:
    # code is loaded from here, so it must be ours: a folder that somebody else made first is not used
    folder = Path(tempfile.gettempdir()) / f"megam3-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid == os.getuid() and status.st_mode & 0o077 == 0 and not folder.is_symlink():
        return folder
    return Path(tempfile.mkdtemp(prefix="megam3-"))
