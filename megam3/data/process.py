"""Worker processes that answer requests, one after the other, through pipes.

A worker is a fresh interpreter that imports one module of ours and nothing else: no fork (unsafe once torch,
gloo or CUDA threads run), no second import of the training script (what multiprocessing's spawn does), no
torch. It ends by itself when its parent is gone, because its standard input ends. What it raises is raised
again in the parent; a worker that dies without an answer is an error too.

    parent                                      worker
    Worker(make_handler, setup)  ──pickle──▶    handler = make_handler(setup)
    worker.send(request)         ──pickle──▶    answer = handler(request)
    worker.receive()             ◀─pickle───    Answer(value=answer) or Answer(error=…)

Pickle is safe here and only here: both ends are this program, and nothing else can write into their pipes.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from megam3.errors import UserError

Handler = Callable[[Any], Any]
MakeHandler = Callable[[Any], Handler]

PROGRAM = "from megam3.data.process import run_worker; run_worker()"


@dataclass(frozen=True)
class Answer:
    """What a worker sends back: a value, a user's error, or the traceback of a fault of ours."""

    value: Any = None
    user_error: UserError | None = None
    traceback: str = ""


class WorkerError(RuntimeError):
    """A worker process failed; the message holds its traceback, or how it died."""


class WorkerKilledError(WorkerError):
    """A signal ended a worker: no fault of ours or of the data, so the run may be started again.

    Args:
        message: which worker, by what.
        number: of the signal.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class Worker:
    """One background process.

    Args:
        make_handler: a function at the top of an importable module; it gets `setup` and returns the handler.
        setup: anything that can be pickled.
    """

    def __init__(self, make_handler: MakeHandler, setup: Any):
        self.module = make_handler.__module__
        # one thread each: the workers themselves are the parallelism, and the training process needs the rest
        threads = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
        path = os.pathsep.join(x or os.getcwd() for x in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **threads, "PYTHONPATH": path},
        )
        self.send((make_handler, setup))

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, request: Any) -> None:
        """Hand over one request without waiting for its answer."""
        assert self._process.stdin is not None
        try:
            _write(self._process.stdin, request)
        except (BrokenPipeError, ValueError):
            # receive() reports the death, with the reason the worker gave in its last answer if it had time
            # to
            return

    def receive(self) -> Any:
        """The answer to the oldest unanswered request.

        Raises:
            UserError: the one the worker raised.
            WorkerKilledError: a signal ended it.
            WorkerError: any other exception in the worker, with its traceback, or its death.
        """
        assert self._process.stdout is not None
        try:
            answer: Answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError, ValueError) as error:  # ValueError: the pipe was closed
            raise self._how_it_ended() from error
        if answer.user_error is not None:
            raise answer.user_error
        if answer.traceback:
            raise WorkerError(f"worker {self.module} (pid {self.pid}) failed:\n{answer.traceback}")
        return answer.value

    def _how_it_ended(self) -> WorkerError:
        code = self._process.wait()
        who = f"worker {self.module} (pid {self.pid})"
        if code >= 0:
            return WorkerError(f"{who} ended with exit code {code} before it answered")
        hint = "; the kernel kills processes this way when memory runs out" if code == -signal.SIGKILL else ""
        died = f"was killed by {signal.Signals(-code).name}"
        return WorkerKilledError(f"{who} {died} before it answered{hint}", -code)

    def kill(self) -> None:
        """End the process, whatever it is doing; a receive() waiting in another thread raises."""
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


def answers_of(workers: Sequence[Worker], requests: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    """(number of the request, answer) as they come: whichever worker is free gets the next request, so that a
    slow one holds up nobody. The workers are idle before and after.

    Raises:
        UserError, WorkerError: the first that a worker answered; all workers are ended then.
    """
    numbered, taking = enumerate(requests), threading.Lock()
    found: queue.SimpleQueue[tuple[int, Any] | BaseException | None] = queue.SimpleQueue()

    def ask(worker: Worker) -> None:
        try:
            while True:
                with taking:
                    number, request = next(numbered, (-1, None))
                if number < 0:
                    break
                worker.send(request)
                found.put((number, worker.receive()))
            found.put(None)
        except BaseException as error:  # raised again by whoever waits for answers
            found.put(error)

    threads = [threading.Thread(target=ask, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    is_whole = False
    try:
        num_running = len(threads)
        while num_running:
            answer = found.get()
            if isinstance(answer, BaseException):
                raise answer
            if answer is None:
                num_running -= 1
            else:
                yield answer
        is_whole = True
    finally:
        if not is_whole:
            # an answer that nobody waits for would be taken for the next request's
            for worker in workers:
                worker.kill()
        for thread in threads:
            thread.join()


def _write(stream: IO[bytes], value: object) -> None:
    pickle.dump(value, stream, protocol=pickle.HIGHEST_PROTOCOL)
    stream.flush()


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer requests until there are no more (worker side)."""
    try:
        make_handler, setup = pickle.load(requests)
        handler = make_handler(setup)
        while True:
            try:
                request = pickle.load(requests)
            except EOFError:
                return
            _write(answers, Answer(value=handler(request)))
    except BrokenPipeError:
        return  # the parent is gone
    except UserError as error:
        last = Answer(user_error=error)
    except Exception:  # everything must reach the parent: a worker has nobody else to tell
        last = Answer(traceback=traceback.format_exc())
    try:
        _write(answers, last)
    except BrokenPipeError:
        return


def run_worker() -> None:
    """Be a worker process (the program of every Worker)."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print must not land in the middle of an answer
    # these reach the whole process group or tree (Ctrl-C, a launcher, Slurm): the parent still needs batches
    # to end its step, and it decides when a worker ends
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    serve(sys.stdin.buffer, answers)
