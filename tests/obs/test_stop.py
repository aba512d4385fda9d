"""What a process does with signals, early, late, twice, and while its main thread is stuck in C."""

import signal
import subprocess
import sys
import time

import pytest

from megam3.obs.stop import EXIT_STOPPED, StopSignal

# the main thread sits in a C call that does not return for signals: Python's handlers cannot run
STUCK = """
import ctypes, sys, threading
from megam3.obs.stop import StopSignal
import megam3.obs.stop as stop
stop.REPEAT_SECONDS = float(sys.argv[1])
with StopSignal():
    print("ready", flush=True)
    libc = ctypes.PyDLL(None) if sys.argv[2] == "gil" else ctypes.CDLL(None)
    lock = threading.Lock(); lock.acquire()
    while True:
        libc.usleep(200_000)
"""


def start(*arguments: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


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
    process = start("1.0", "")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == EXIT_STOPPED
    assert "second SIGTERM, leaving without saving" in said


def test_a_second_ctrl_c_ends_at_once_and_the_first_says_so() -> None:
    process = start("60.0", "")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    # what a launcher makes of the same Ctrl-C is no second request
    process.send_signal(signal.SIGTERM)
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == EXIT_STOPPED
    assert said == (
        "megam3: Ctrl-C: saving after the step in progress; Ctrl-C again leaves at once, without saving\n"
        "megam3: second Ctrl-C, leaving without saving\n"
    )


def test_usr2_shows_the_stacks_and_the_process_goes_on() -> None:
    process = start("1.0", "")
    process.send_signal(signal.SIGUSR2)
    time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    _, said = process.communicate()
    assert "Current thread" in said
    assert 'File "<string>", line' in said


def test_it_costs_no_heavy_import() -> None:
    code = (
        "import sys, megam3.obs.stop; print([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
