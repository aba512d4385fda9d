"""A copy of an engine's state in host memory, so that it can be written while the weights move on.

    snapshot(state_dict, buffers)      the same nested structure, every tensor a copy on the CPU

Storages are copied whole and once: tensors that share memory share it in the copy as well. `torch.save` then
writes what it would have written of the original (a view writes its whole storage), so a checkpoint has the
same contents whether it was written at once or from a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

MEMORY_MARGIN = 1.1
"""A copy may take this much less than the host has left: data workers and the page cache breathe."""


class HostBuffers:
    """Host memory for copies of a GPU's storages: page-locked, and kept from one checkpoint to the next.

    Locking pages costs about as much as copying them, so buffers are reused by size; a second copy at the
    same time is the caller's to prevent. Copies of CPU tensors are ordinary memory and are freed once they
    are written.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[torch.UntypedStorage]] = {}
        self._taken: list[torch.UntypedStorage] = []

    def copy(self, storage: torch.UntypedStorage) -> torch.UntypedStorage:
        """A copy of `storage` on the host; from a GPU it arrives by the next `synchronize` of its device."""
        if storage.device.type == "cpu":
            return storage.clone()
        waiting = self._free.get(storage.nbytes())
        target = waiting.pop() if waiting else _pinned(storage.nbytes())
        self._taken.append(target)
        target.copy_(storage, non_blocking=True)
        return target

    def missing_bytes(self, storages: Iterable[torch.UntypedStorage]) -> int:
        """Host memory that copies of `storages` would take beyond what is held here already."""
        waiting = {size: len(free) for size, free in self._free.items()}
        missing = 0
        for storage in storages:
            size = storage.nbytes()
            if storage.device.type == "cpu":
                missing += size
            elif waiting.get(size):
                waiting[size] -= 1
            else:
                missing += 1 << max(size - 1, 0).bit_length()  # torch rounds page-locked memory up
        return missing

    def release(self) -> None:
        """Every copy so far has been written: their memory may be used again."""
        for storage in self._taken:
            self._free.setdefault(storage.nbytes(), []).append(storage)
        self._taken.clear()


def _pinned(num_bytes: int) -> torch.UntypedStorage:
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).untyped_storage()


def snapshot(value: Any, buffers: HostBuffers) -> Any:
    """A copy of nested dictionaries, lists, tuples and tensors that later steps do not change."""
    copied = _Copier(buffers).copy(value)
    # a run on a CPU beside a GPU shall not open it
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


class _Copier:
    """One pass over one structure; remembers what it has copied: storages and containers are shared."""

    def __init__(self, buffers: HostBuffers):
        self._buffers = buffers
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._objects: dict[int, Any] = {}

    def copy(self, value: Any) -> Any:
        if id(value) in self._objects:
            return self._objects[id(value)]
        if isinstance(value, Tensor):
            copied: Any = self._tensor(value)
        elif isinstance(value, dict):
            copied = copy.copy(value)  # keeps an OrderedDict one, with its attributes
            for key in copied:
                copied[key] = self.copy(value[key])
        elif type(value) is list:
            copied = [self.copy(item) for item in value]
        elif type(value) is tuple:
            copied = tuple(self.copy(item) for item in value)
        else:
            # numbers, strings, shapes, DeepSpeed's small records: all without tensors
            copied = copy.deepcopy(value)
        self._objects[id(value)] = copied
        return copied

    def _tensor(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = self._buffers.copy(storage)
        copied = torch.empty(0, dtype=tensor.dtype).set_(
            self._storages[key], tensor.storage_offset(), tensor.size(), tensor.stride()
        )
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(copied, requires_grad=tensor.requires_grad)
        return copied.requires_grad_(tensor.requires_grad)


def storages_of(value: Any) -> list[torch.UntypedStorage]:
    """The distinct storages below a nested structure, each of which `snapshot` copies once."""
    found: dict[int, torch.UntypedStorage] = {}
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            found[storage._cdata] = storage
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)
    return list(found.values())
