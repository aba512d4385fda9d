"""An ssh server on each of two hosts made by `tests.hosts_apart`, with keys of their own, and the `ssh` that
reaches them: what launchers use to start ranks on other hosts."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.hosts_apart import Hosts, missing_for_hosts

SERVER = """\
HostKey {folder}/host
AuthorizedKeysFile {folder}/key.pub
StrictModes no
UsePAM no
PermitRootLogin yes
PidFile none
"""
CLIENT = """\
#!/bin/sh
exec {ssh} -F /dev/null -i {folder}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null \\
  -o LogLevel=ERROR "$@"
"""


def missing_for_ssh() -> str:
    """What this machine lacks; empty when nothing."""
    missing = [name for name in ("sshd", "ssh", "ssh-keygen") if not shutil.which(name, path=_path())]
    if missing:
        return f"{', '.join(missing)} not found (Debian: apt-get install openssh-server)"
    return missing_for_hosts()


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@contextlib.contextmanager
def ssh_servers(hosts: Hosts, folder: Path) -> Iterator[Mapping[str, str]]:
    """Servers on both hosts until the end; yields the environment in which `ssh ADDRESS` reaches them."""
    folder.mkdir()
    for name in ("host", "key"):
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)]
        subprocess.run(command, check=True)
    (folder / "sshd_config").write_text(SERVER.format(folder=folder))
    client = folder / "bin" / "ssh"
    client.parent.mkdir()
    client.write_text(CLIENT.format(folder=folder, ssh=shutil.which("ssh")))
    client.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd gives up its rights
    sshd = shutil.which("sshd", path=_path()) or "sshd"
    with contextlib.ExitStack() as stack:
        for number in range(2):
            command = hosts.command(number, sshd, "-D", "-e", "-f", str(folder / "sshd_config"))
            server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            stack.callback(server.wait)
            stack.callback(server.terminate)
        environ = {**os.environ, "PATH": f"{client.parent}:{_path()}"}
        for address in hosts.addresses:
            _wait_for(hosts, address, environ)
        yield environ


def _wait_for(hosts: Hosts, address: str, environ: Mapping[str, str]) -> None:
    end = time.monotonic() + 120
    command = hosts.command(0, "ssh", address, "true")
    while subprocess.run(command, env=dict(environ), capture_output=True, check=False).returncode:
        assert time.monotonic() < end, f"no ssh server answers at {address} ({socket.gethostname()})"
        time.sleep(0.2)
