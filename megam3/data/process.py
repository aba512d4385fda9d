"""Worker processes that answer requests: JSON lines in, frames of JSON and arrays out.

A worker is a fresh interpreter that runs one module of ours, nothing else: no fork (unsafe once torch, gloo or CUDA
threads run), no second import of the training script (what multiprocessing's spawn does), no pickle, no torch. It ends by itself when its
parent is gone, because its standard input ends. Whatever it raises comes back as text and is raised again in the parent; a worker that dies
without a word is an error too.

    parent                                 worker: python -m MODULE, which ends with run_worker(make_handler)
    Worker(make_handler, setup)  ──JSON──▶ handler = make_handler(setup)
    worker.send({"step": 3})     ──JSON──▶ answer, arrays = handler({"step": 3})
    worker.receive()             ◀─frame── header JSON line, then the bytes of each array
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from megam3 import errors

Handler = Callable[[dict], tuple[dict, list[np.ndarray]]]
MakeHandler = Callable[[dict], Handler]


class WorkerError(RuntimeError):
    """A worker process failed; the message holds its traceback, or how it died."""


class Worker:
    """One background process.

    Args:
        make_handler: a function of a module that calls `run_worker` with it when run as a program; it gets `setup` and returns the handler.
        setup: anything JSON can hold.
    """

    def __init__(self, make_handler: MakeHandler, setup: dict):
        self.module = make_handler.__module__
        # one thread each: the workers themselves are the parallelism, and the training process needs the rest
        threads = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
        path = os.pathsep.join(x or os.getcwd() for x in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": path},
        )
        self.send(setup)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, request: dict) -> None:
        """Hand over one request without waiting for its answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except (BrokenPipeError, ValueError):
            # receive() reports the death, with the reason the worker left in its last frame if it had time to
            return

    def receive(self) -> tuple[dict, list[np.ndarray]]:
        """The answer to the oldest unanswered request.

        Raises:
            UserError: the one the worker raised.
            WorkerError: any other exception in the worker, with its traceback, or its death.
        """
        stream = self._process.stdout
        assert stream is not None
        line = stream.readline()
        if not line.endswith(b"\n"):
            raise WorkerError(self._epitaph())
        header = json.loads(line)
        if "user_error" in header:
            name, arguments = header["user_error"]
            raise getattr(errors, name)(*arguments)
        if "traceback" in header:
            raise WorkerError(f"worker {self.module} (pid {self.pid}) failed:\n{header['traceback']}")
        return header["answer"], [self._read_array(stream, *spec) for spec in header["arrays"]]

    def _read_array(self, stream: IO[bytes], kind: str, length: int) -> np.ndarray:
        array = np.empty(length, np.dtype(kind))
        if array.nbytes and stream.readinto(array.data.cast("B")) != array.nbytes:  # type: ignore[attr-defined]
            raise WorkerError(self._epitaph())
        return array

    def _epitaph(self) -> str:
        code = self._process.wait()
        died = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; the kernel kills processes this way when memory runs out" if code == -signal.SIGKILL else ""
        return f"worker {self.module} (pid {self.pid}) {died} before it answered{hint}"

    def kill(self) -> None:
        """End the process, whatever it is doing; a receive() that waits for it in another thread returns with an error."""
        self._process.kill()

    def close(self) -> None:
        """End the process and release its pipes."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            try:
                stream.close()
            except BrokenPipeError:
                continue


def serve(make_handler: MakeHandler, requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more (the worker's side)."""
    try:
        handler = make_handler(json.loads(requests.readline()))
        while line := requests.readline():
            answer, arrays = handler(json.loads(line))
            flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
            header = {"answer": answer, "arrays": [[array.dtype.str, len(array)] for array in flat]}
            answers.write(json.dumps(header).encode() + b"\n")
            for array in flat:
                answers.write(array.data)
            answers.flush()
    except errors.UserError as error:
        _last_words(
            answers,
            {
                "user_error": [
                    type(error).__name__,
                    _plain([error.what, error.value, error.rule, error.remedy]),
                ]
            },
        )
    except Exception:  # everything must reach the parent: a worker has nobody else to tell
        _last_words(answers, {"traceback": traceback.format_exc()})


def _plain(values: list[Any]) -> list[Any]:
    return [value if isinstance(value, str | int | float | None) else repr(value) for value in values]


def _last_words(answers: IO[bytes], header: dict) -> None:
    try:
        answers.write(json.dumps(header).encode() + b"\n")
        answers.flush()
    except BrokenPipeError:
        return


def run_worker(make_handler: MakeHandler) -> None:
    """Be a worker process: what a module with a `make_handler` does when it is run as a program."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not land in the middle of a frame
    # these reach the whole process group or tree (Ctrl-C, a launcher, Slurm): the parent still needs batches to end its step, and it
    # decides when a worker ends
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    serve(make_handler, sys.stdin.buffer, answers)
