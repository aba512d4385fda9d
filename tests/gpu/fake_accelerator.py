"""A device made of CPU memory, which sees what stays on it.

DeepSpeed's offload asks its accelerator for streams, pinned memory and "is this tensor on the device?". Here
every CPU tensor is on the device but the pinned ones. Every tensor handed to a copy, or made by one, is
watched by a weak reference: `live_bytes()` is what a GPU would still hold of them.

Copies on a stream are queued and run only when somebody waits for the stream or for an event behind them, as
late as a real device may run them: a missing wait shows as wrong numbers.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator

from deepspeed.runtime.activation_checkpointing import offload_activations
from torch import Tensor


class FakeEvent:
    """Everything queued on a stream up to here."""

    def __init__(self, stream: "FakeStream"):
        self._stream, self._position = stream, stream.queued

    def synchronize(self) -> None:
        self._stream.run_until(self._position)

    def query(self) -> bool:
        return self._stream.done >= self._position


class FakeStream:
    """A queue of copies, run in order and as late as possible."""

    def __init__(self) -> None:
        self._work: list[Callable[[], None]] = []
        self.queued = self.done = 0

    def push(self, work: Callable[[], None]) -> None:
        self._work.append(work)
        self.queued += 1

    def run_until(self, position: int) -> None:
        while self.done < position:
            self._work.pop(0)()
            self.done += 1

    def record_event(self) -> FakeEvent:
        return FakeEvent(self)

    def wait_event(self, event: FakeEvent) -> None:
        event.synchronize()

    def wait_stream(self, stream: "FakeStream") -> None:
        stream.run_until(stream.queued)

    def synchronize(self) -> None:
        self.run_until(self.queued)


class FakeAccelerator:
    """What `offload_activations` asks of DeepSpeed's accelerator."""

    Stream = FakeStream

    def __init__(self) -> None:
        self.compute, self.active = FakeStream(), None
        self.pinned: list[weakref.ref] = []
        self.watched: list[weakref.ref] = []
        self.pinned_allocations = 0

    def is_synchronized_device(self) -> bool:
        return False

    def on_accelerator(self, tensor: Tensor) -> bool:
        return True

    def current_stream(self) -> FakeStream:
        return self.compute

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.active = self.active, stream
        yield
        self.active = before

    def pin_memory(self, tensor: Tensor, make_copy: bool = True) -> Tensor:
        self.pinned_allocations += 1
        return tensor

    def watch(self, tensor: Tensor) -> None:
        self.watched.append(weakref.ref(tensor.untyped_storage()))

    def live_bytes(self) -> int:
        """Bytes of watched storages that are still alive, each counted once."""
        alive = {
            storage.data_ptr(): storage.nbytes() for ref in self.watched if (storage := ref()) is not None
        }
        return sum(alive.values())


def install(monkeypatch) -> FakeAccelerator:
    """Put the fake in the place of DeepSpeed's accelerator, and its queues in the place of non-blocking
    copies."""
    fake = FakeAccelerator()
    monkeypatch.setattr(offload_activations, "get_accelerator", lambda: fake)
    plain_copy = Tensor.copy_

    def copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if not non_blocking or fake.active is None:
            return plain_copy(self, source)
        fake.active.push(lambda: plain_copy(self, source))
        return self

    monkeypatch.setattr(Tensor, "copy_", copy)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    return fake
