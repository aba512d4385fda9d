"""Ranks from each source, in their order, and an environment that needs no writable HOME."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megam3.dist import env as env_module
from megam3.dist.env import (
    RankInfo,
    discover_ranks,
    first_host,
    free_port,
    prepare_environment,
    slurm_port,
)
from megam3.errors import ConfigError

LAUNCHER = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1234"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_NODELIST": "n[02-03,7]",
    "SLURM_JOB_ID": "41",
}
STEP = {**SLURM, "SLURM_STEP_ID": "0"}


def test_launcher_comes_first() -> None:
    assert discover_ranks({**SLURM, **LAUNCHER, "OMPI_COMM_WORLD_RANK": "0"}) == RankInfo(
        rank=3, local_rank=1, world_size=4, master_addr="a", master_port=1234, source="launcher"
    )


def test_slurm_comes_second() -> None:
    assert discover_ranks({**STEP, "PMI_RANK": "0"}) == RankInfo(
        rank=5, local_rank=1, world_size=8, master_addr="n02", master_port=12_410, source="slurm"
    )


def test_a_step_can_be_smaller_than_its_job() -> None:
    step = {**STEP, "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_NODELIST": "n7"}
    assert discover_ranks(step) == RankInfo(
        rank=5, local_rank=1, world_size=6, master_addr="n7", master_port=12_410, source="slurm"
    )


def test_site_settings_win_over_slurms_guess() -> None:
    info = discover_ranks({**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (info.master_addr, info.master_port) == ("10.0.0.1", 4000)


def test_a_batch_script_is_one_process() -> None:
    assert discover_ranks({**SLURM, "ENVIRONMENT": "BATCH"}).source == "single"
    assert discover_ranks({**STEP, "ENVIRONMENT": "BATCH"}).source == "slurm"


def test_alone() -> None:
    assert discover_ranks({"HOME": "/"}) == RankInfo(
        rank=0, local_rank=0, world_size=1, master_addr="127.0.0.1", master_port=29500, source="single"
    )


def test_export_is_read_back() -> None:
    info = discover_ranks(STEP)
    environ: dict[str, str] = {}
    info.export(environ)
    assert discover_ranks(environ) == RankInfo(
        rank=5, local_rank=1, world_size=8, master_addr="n02", master_port=12_410, source="launcher"
    )


def test_mpi_is_asked_last(monkeypatch: pytest.MonkeyPatch) -> None:
    # what mpi4py offers, for the third of four ranks, second on its node
    class Node:
        def Get_rank(self) -> int:
            return 1

    class World:
        def Get_rank(self) -> int:
            return 2

        def Get_size(self) -> int:
            return 4

        def Split_type(self, kind: int) -> Node:
            return Node()

        def bcast(self, value: str, root: int) -> str:
            return "first"

    class Fake:
        COMM_WORLD, COMM_TYPE_SHARED = World(), 0

        @staticmethod
        def Get_processor_name() -> str:
            return "here"

    monkeypatch.setitem(sys.modules, "mpi4py", type(sys)("mpi4py"))
    monkeypatch.setattr(sys.modules["mpi4py"], "MPI", Fake, raising=False)
    assert discover_ranks({"OMPI_COMM_WORLD_SIZE": "4"}) == RankInfo(
        rank=2, local_rank=1, world_size=4, master_addr="first", master_port=29500, source="mpi"
    )
    assert discover_ranks({"PMI_SIZE": "4", "MASTER_ADDR": "m"}).master_addr == "m"


def test_mpi_variables_without_an_mpi_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(
        ConfigError,
        match="MPI's variables are set but MPI cannot be loaded .*; "
        "load the cluster's MPI module, or start with",
    ):
        discover_ranks({"OMPI_COMM_WORLD_SIZE": "4"})


def test_mpi4py_is_not_imported_without_need() -> None:
    code = "import sys; from megam3.dist.env import discover_ranks; discover_ranks({}); "
    code += "assert 'mpi4py' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def message(environ: dict[str, str]) -> str:
    with pytest.raises(ConfigError) as caught:
        discover_ranks(environ)
    return str(caught.value)


def test_partial_launcher_variables_name_what_is_missing() -> None:
    assert message({"RANK": "0", "WORLD_SIZE": "2", "SLURM_PROCID": "0"}) == (
        "environment = {'RANK': '0', 'WORLD_SIZE': '2'}: the launcher's variables come together, "
        "and LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set; "
        "start with `deepspeed` or `torchrun`, or unset RANK, WORLD_SIZE and LOCAL_RANK for one process"
    )


def test_partial_slurm_variables_name_what_is_missing() -> None:
    assert message({"SLURM_PROCID": "1"}) == (
        "environment = {'SLURM_PROCID': '1'}: a Slurm task has more variables than this, "
        "and SLURM_NTASKS, SLURM_LOCALID, SLURM_JOB_NODELIST is not set; "
        "start with `srun`, or unset SLURM_PROCID"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"RANK": "x"}, "RANK = 'x': must be a whole number; correct or unset RANK"),
        (
            {"RANK": "4"},
            "rank = 4: must be at least 0 and below the world size 4 (launcher); "
            "correct the launcher's variables",
        ),
        ({"RANK": "-1"}, "rank = -1: must be at least 0"),
        (
            {"RANK": "0"},
            "local rank = 1: must be at least 0 and not above the rank 0 (launcher); "
            "correct the launcher's variables",
        ),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT = 70000: is no port number; use one from 1024 to 65535"),
    ],
)
def test_impossible_numbers(changes: dict[str, str], expected: str) -> None:
    assert expected in message({**LAUNCHER, **changes})


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("a,b", "a"),
        ("n[0-3,7]", "n0"),
        ("n[7,0-3]", "n7"),
        ("gpu[007-012],cpu1", "gpu007"),
        ("rack[1-2]node[3-4]", "rack1node3"),
        ("n[1-2]-ib", "n1-ib"),
        ("a.example.org,b[1-2]", "a.example.org"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_unreadable_node_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        ConfigError, match="cannot be read as a Slurm node list; set MASTER_ADDR to the host of rank 0"
    ):
        first_host("n[[")


def test_scontrol_reads_what_we_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "scontrol"
    script.write_text('#!/bin/sh\n[ "$1 $2" = "show hostnames" ] && printf "first\\nsecond\\n"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert first_host("n[1-2:2]") == "first"


def test_ports_differ_between_steps_and_stay_below_the_ephemeral_range() -> None:
    ports = {
        slurm_port({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(1500, 1600)
        for step in range(3)
    }
    assert len(ports) == 300
    assert min(ports) > 1024
    assert max(ports) < 32_768
    assert slurm_port({"SLURM_JOB_ID": "x"}) == 12_000


def test_a_free_port_is_none_that_the_system_may_hand_out_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(env_module, "EPHEMERAL_RANGE", tmp_path / "range")
    (tmp_path / "range").write_text("32768\t60999\n")
    assert all(12_000 <= free_port() < 32_768 for _ in range(50))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        # every draw finds somebody there; the system hands out nearly all ports; it does not say which
        monkeypatch.setattr(env_module.random.SystemRandom, "randrange", lambda *limits: taken)
        for said in ("32768\t60999\n", "1024\t65535\n", "?"):
            (tmp_path / "range").write_text(said)
            assert free_port() != taken


def test_accelerator_is_set_without_a_gpu_only_when_nobody_did() -> None:
    environ = {"HOME": "/tmp", "PATH": "/bin"}
    prepare_environment(environ, has_gpu=False)
    assert environ["DS_ACCELERATOR"] == "cpu"
    environ = {"HOME": "/tmp", "DS_ACCELERATOR": "xpu"}
    prepare_environment(environ, has_gpu=False)
    assert environ["DS_ACCELERATOR"] == "xpu"
    environ = {"HOME": "/tmp"}
    prepare_environment(environ, has_gpu=True)
    assert "DS_ACCELERATOR" not in environ


@pytest.mark.parametrize(
    ("has_gpu", "given", "expected"),
    [
        (True, {}, {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}),
        (
            True,
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"},
            {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"},
        ),
        (True, {"PYTORCH_CUDA_ALLOC_CONF": ""}, {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        (False, {}, {}),
    ],
)
def test_memory_of_gpus_grows_in_segments_unless_somebody_chose(has_gpu, given, expected) -> None:
    environ = {"HOME": "/tmp", **given}
    prepare_environment(environ, has_gpu=has_gpu)
    assert {name: value for name, value in environ.items() if "ALLOC" in name} == expected


def test_a_writable_home_is_used(tmp_path: Path) -> None:
    environ = {"HOME": str(tmp_path)}
    prepare_environment(environ, has_gpu=False)
    assert "TORCH_EXTENSIONS_DIR" not in environ


@pytest.mark.parametrize("home", ["/dev/null", "/proc/1", None])
def test_caches_move_when_home_cannot_be_written(
    home: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environ = {"TRITON_CACHE_DIR": "/mine"} | ({"HOME": home} if home else {"HOME": "/dev/null/none"})
    prepare_environment(environ, has_gpu=False)
    folder = Path(environ["TORCH_EXTENSIONS_DIR"]).parent
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert environ["TRITON_CACHE_DIR"] == "/mine"
    again = {"HOME": "/dev/null"}
    prepare_environment(again, has_gpu=False)
    assert again["TORCH_EXTENSIONS_DIR"] == environ["TORCH_EXTENSIONS_DIR"]


def test_a_cache_folder_open_to_others_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"megam3-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"megam3-{os.getuid()}").chmod(0o777)
    environ = {"HOME": "/dev/null"}
    prepare_environment(environ, has_gpu=False)
    assert Path(environ["HF_HOME"]).parent != tmp_path / f"megam3-{os.getuid()}"


def test_path_gets_the_interpreters_folder_once() -> None:
    environ = {"HOME": "/tmp", "PATH": "/bin"}
    prepare_environment(environ, has_gpu=False)
    prepare_environment(environ, has_gpu=False)
    assert environ["PATH"] == f"/bin:{Path(sys.executable).parent}"
