"""Two hosts on one machine: network namespaces whose link is in our hands.

    apart0  10.77.n.1  eth0 ── veth ── wire0 ─┐
                                              relay: frames wait, are lost, or stop
    apart1  10.77.n.2  eth0 ── veth ── wire1 ─┘

The relay copies frames between two packet sockets. `tc netem` would do the same inside the kernel, but not
every kernel has it (the one these tests were written on has not), and a relay is the same everywhere. A cut
here is that of a cable beyond a switch: no interface goes down and nobody is told.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import random
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

ETH_P_ALL = 3
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17
MAX_FRAME_BYTES = 1 << 16
PACKET_OUTGOING = 4


def missing_for_hosts() -> str:
    """What this machine lacks for two hosts of its own; empty when nothing."""
    if os.getuid() != 0:
        return "only root can make network namespaces"
    if shutil.which("ip", path=_path()) is None:
        return "ip not found (Debian: apt-get install iproute2)"
    probe = f"apart-probe-{os.getpid()}"
    done = subprocess.run([*_IP, "netns", "add", probe], capture_output=True, text=True, check=False)
    subprocess.run([*_IP, "netns", "del", probe], capture_output=True, check=False)
    return "" if done.returncode == 0 else f"no network namespaces: {done.stderr.strip()}"


def _path() -> str:
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


_IP = (shutil.which("ip", path=_path()) or "ip",)


@dataclass
class Link:
    """What happens to frames from now on; change it at any time."""

    is_cut: bool = False
    delay_seconds: float = 0.0
    """Each way."""
    loss: float = 0.0
    """Share of frames that never arrive, drawn from a fixed seed."""


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Two names for `ip netns exec`, their addresses, and the link between them."""

    names: Sequence[str]
    addresses: Sequence[str]
    link: Link

    def command(self, host: int, *command: str) -> list[str]:
        """`command` as it is started on a host."""
        return [*_IP, "netns", "exec", self.names[host], *command]


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make both, and take them away at the end."""
    number = os.getpid() % 250
    names = [f"apart{side}-{os.getpid()}" for side in range(2)]
    wires = [f"wire{side}-{os.getpid() % 100_000}" for side in range(2)]
    addresses = [f"10.77.{number}.{side + 1}" for side in range(2)]
    link, ended = Link(), threading.Event()
    with contextlib.ExitStack() as stack:
        for name, wire, address in zip(names, wires, addresses, strict=True):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            _ip("link", "add", wire, "type", "veth", "peer", "name", "eth0", "netns", name)
            # by itself: a namespace takes its veth along only once its last process has ended, and the next
            # use of these hosts wants the same names
            stack.callback(_ip, "link", "del", wire)
            _ip("link", "set", wire, "up")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _compute_checksums(name)
        sockets = [stack.enter_context(_packet_socket(wire)) for wire in wires]
        thread = threading.Thread(target=_relay, args=(sockets, link, ended), daemon=True)
        thread.start()
        stack.callback(thread.join, 5)
        stack.callback(ended.set)
        yield Hosts(names=names, addresses=addresses, link=link)


def _ip(*arguments: str) -> None:
    done = subprocess.run([*_IP, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def _compute_checksums(name: str) -> None:
    """Have the namespace's eth0 send whole frames with real checksums: a veth leaves both to the receiver,
    which a relay is not."""
    program = (
        "import array, fcntl, socket, struct; s = socket.socket();"
        f"value = array.array('B', struct.pack('II', {ETHTOOL_STXCSUM}, 0));"
        "request = struct.pack('16sP', b'eth0', value.buffer_info()[0]);"
        f"fcntl.ioctl(s, {SIOCETHTOOL}, request)"
    )
    python = shutil.which("python3") or "python3"
    subprocess.run([*_IP, "netns", "exec", name, python, "-c", program], check=True)


def _packet_socket(interface: str) -> socket.socket:
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    made.bind((interface, 0))
    made.setblocking(False)
    return made


def _relay(sockets: Sequence[socket.socket], link: Link, ended: threading.Event) -> None:
    rng, waiting, count = random.Random(0), [], 0
    while not ended.is_set():
        pause = max(0.0, min(0.1, waiting[0][0] - time.monotonic())) if waiting else 0.1
        for source in select.select(sockets, [], [], pause)[0]:
            frame, address = source.recvfrom(MAX_FRAME_BYTES)
            # a packet socket also sees what was sent through it
            if address[2] == PACKET_OUTGOING or link.is_cut or rng.random() < link.loss:
                continue
            target = sockets[1 - sockets.index(source)]
            count += 1
            heapq.heappush(waiting, (time.monotonic() + link.delay_seconds, count, target, frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, frame = heapq.heappop(waiting)
            with contextlib.suppress(OSError):  # the other end's queue is full: lost, as on a real link
                target.send(frame)
