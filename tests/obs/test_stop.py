"""What a process does with signals, early, late, twice, and while its main thread is stuck in C."""

import signal
import subprocess
import sys

import pytest

from megam3.obs.stop import EXIT_STOPPED, StopSignal

# the main thread sits in a C call that does not return for signals: Python's handlers cannot run. The time at
# which each request arrives is given, so that it does not depend on the machine
STUCK = """
import ctypes, sys, threading, types
from megam3.obs.stop import StopSignal
import megam3.obs.stop as stop
times = iter(sys.argv[2:])

def monotonic():
    now = float(next(times))
    print("got one", flush=True)
    return now

stop.REPEAT_SECONDS = float(sys.argv[1])
stop.time = types.SimpleNamespace(monotonic=monotonic)
with StopSignal():
    print("ready", flush=True)
    libc = ctypes.CDLL(None)
    lock = threading.Lock(); lock.acquire()
    while True:
        libc.usleep(200_000)
"""


def start(repeat_seconds: float, *times: float) -> subprocess.Popen:
    arguments = [str(value) for value in (repeat_seconds, *times)]
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def send(process: subprocess.Popen, number: signal.Signals) -> None:
    """A request, which the process takes note of: it has not ended by the one before."""
    process.send_signal(number)
    assert process.stdout
    assert process.stdout.readline() == "got one\n"


@pytest.mark.parametrize(
    ("sent", "requeue", "stop"), [("USR1", True, False), ("TERM", False, True), ("INT", False, True)]
)
def test_the_warning_asks_for_a_requeue_and_term_for_an_end(sent: str, requeue: bool, stop: bool) -> None:
    with StopSignal() as asked:
        assert not asked.requested
        signal.raise_signal(signal.Signals[f"SIG{sent}"])
        assert (asked.requested, asked.wants_requeue, asked.wants_stop) == (True, requeue, stop)


def test_the_old_handlers_come_back() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with StopSignal():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_second_term_ends_at_once_and_the_same_one_delivered_twice_does_not() -> None:
    process = start(1.0, 0.0, 0.1, 1.3)
    for _ in range(3):
        send(process, signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    assert said == "megam3: second SIGTERM, leaving without saving\n"


def test_a_second_ctrl_c_ends_at_once_and_the_first_says_so() -> None:
    process = start(60.0, 0.0, 0.2, 0.8)
    send(process, signal.SIGINT)
    # what a launcher makes of the same Ctrl-C is no second request
    send(process, signal.SIGTERM)
    send(process, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED
    assert said == (
        "megam3: Ctrl-C: saving after the step in progress; Ctrl-C again leaves at once, without saving\n"
        "megam3: second Ctrl-C, leaving without saving\n"
    )


def test_usr2_shows_the_stacks_and_the_process_goes_on() -> None:
    process = start(1.0, 0.0)
    process.send_signal(signal.SIGUSR2)
    assert process.stderr
    said = [process.stderr.readline()]
    while said[-1] and 'File "<string>", line' not in said[-1]:
        said.append(process.stderr.readline())
    send(process, signal.SIGTERM)
    process.kill()
    said.append(process.communicate()[1])
    assert "Current thread" in "".join(said)
    assert 'File "<string>", line' in "".join(said)


def test_it_costs_no_heavy_import() -> None:
    code = (
        "import sys, megam3.obs.stop; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
