"""Two steps on two ranks by each launcher that people use instead of Slurm: `mpirun` on one machine, with
ranks from mpi4py, and `deepspeed --hostfile` on two hosts that are apart.

MEGAM3_LONG=1 adds the launchers that few people use: MPICH, and DeepSpeed by Open MPI and MPICH.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from megam3.dist.env import free_port
from tests.hosts_apart import Hosts, two_hosts
from tests.launches import ROOT, Workplace, make_workplace
from tests.ssh_hosts import missing_for_ssh, ssh_servers

pytestmark = pytest.mark.ranks
MISSING = missing_for_ssh()
MPICH_LIBRARY = Path("/usr/lib/x86_64-linux-gnu/libmpich.so.12")
"""Debian's name of what everybody else calls libmpi.so.12."""


for_long = pytest.mark.skipif(not os.environ.get("MEGAM3_LONG"), reason="MEGAM3_LONG=1 is not set")


def needs(*programs: str) -> pytest.MarkDecorator:
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not found")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_workplace(tmp_path_factory.mktemp("launchers"))


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}


def train(command: list[str], place: Workplace, name: str, environ: Mapping[str, str], module: str) -> str:
    """Two steps; everything that was said."""
    arguments = [place.recipe, f"name={name}", "train.steps=2", "train.timeout_seconds=300"]
    done = subprocess.run(
        [*command, module, *arguments],
        cwd=ROOT,
        env=dict(environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "2 ranks, ZeRO stage" in done.stdout, done.stdout[-6000:]
    assert [row["step"] for row in place.rows(name)] == [1, 2], done.stdout[-6000:]
    return done.stdout


@needs("mpirun.openmpi")
def test_mpirun_of_open_mpi(place: Workplace) -> None:
    # both names of root's consent, and two ranks on however few cores
    environ = environment(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    environ["MASTER_PORT"] = str(free_port())
    command = ["mpirun.openmpi", "--oversubscribe", "-np", "2", sys.executable, "-m"]
    train(command, place, "openmpi", environ, "megam3.train")


@for_long
@needs("mpirun.mpich")
def test_mpirun_of_mpich(place: Workplace, tmp_path: Path) -> None:
    if MPICH_LIBRARY.exists():
        (tmp_path / "libmpi.so.12").symlink_to(MPICH_LIBRARY)
    environ = environment(LD_LIBRARY_PATH=str(tmp_path), MASTER_PORT=str(free_port()))
    command = ["mpirun.mpich", "-np", "2", sys.executable, "-m"]
    train(command, place, "mpich", environ, "megam3.train")


@dataclass(frozen=True)
class Site:
    """Two hosts with ssh servers, and the environment that reaches them."""

    hosts: Hosts
    environ: Mapping[str, str]
    hostfile: Path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    hostfile = folder / "hostfile"
    # what DeepSpeed sets on the other hosts: PYTHONPATH goes there by itself
    (folder / "deepspeed_env").write_text("GLOO_SOCKET_IFNAME=eth0\nOMP_NUM_THREADS=1\nDS_ACCELERATOR=cpu\n")
    with two_hosts() as hosts, ssh_servers(hosts, folder / "ssh") as environ:
        hostfile.write_text("".join(f"{address} slots=1\n" for address in hosts.addresses))
        yield Site(hosts, {**environ, "DS_ENV_FILE": str(folder / "deepspeed_env")}, hostfile)


needs_site = pytest.mark.skipif(bool(MISSING), reason=MISSING or "two hosts with ssh can be made")


def deepspeed(site: Site, launcher: str, *more: str) -> list[str]:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(site.hostfile)]
    command += ["--launcher", launcher, "--master_addr", site.hosts.addresses[0]]
    return site.hosts.command(0, *command, "--master_port", str(free_port()), *more)


@needs_site
@needs("pdsh")
def test_deepspeed_by_pdsh(place: Workplace, site: Site) -> None:
    environ = environment(**site.environ)
    said = train(deepspeed(site, "pdsh", "--module"), place, "pdsh", environ, "megam3.train")
    assert all(f"{address}: " in said for address in site.hosts.addresses), "a line of each host"


@for_long
@needs_site
@needs("mpirun.openmpi", "ompi_info")
def test_deepspeed_by_openmpi(place: Workplace, site: Site, tmp_path: Path) -> None:
    (tmp_path / "mpirun").symlink_to(shutil.which("mpirun.openmpi") or "")
    environ = environment(**site.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    environ |= {"PATH": f"{tmp_path}:{environ['PATH']}", "MASTER_PORT": str(free_port())}
    # without `-x`, mpirun hands no variable to other hosts; the meeting point is the host of rank 0
    more = f"-x MASTER_PORT -x MASTER_ADDR={site.hosts.addresses[0]} --mca btl_tcp_if_include eth0"
    command = deepspeed(site, "openmpi", "--launcher_args", more, "--module")
    train(command, place, "by-openmpi", environ, "megam3.train")


@for_long
@needs_site
@needs("mpirun.mpich")
def test_deepspeed_by_mpich(place: Workplace, site: Site, tmp_path: Path) -> None:
    # a link would look for its parts beside itself
    (tmp_path / "mpirun").write_text(f'#!/bin/sh\nexec {shutil.which("mpirun.mpich")} "$@"\n')
    (tmp_path / "mpirun").chmod(0o755)
    environ = environment(**site.environ)
    environ["PATH"] = f"{tmp_path}:{environ['PATH']}"
    # DeepSpeed's helper for MPICH starts scripts only
    train(deepspeed(site, "mpich"), place, "by-mpich", environ, str(ROOT / "tools" / "train.py"))
