"""Most bytes of tensors alive at a time, counted by storage: exact, quick, and blind to what an operator
allocates inside itself and to the allocator.

    with LivePeak() as live:
        step()
    live.peak_bytes

The probes beside this file measure a process instead; a test compares the two.
"""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LivePeak(TorchDispatchMode):
    """Counts storages that operators return while it is on; those that were there before count 0."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then count what it returned."""
        # what comes in was made before, or by an operator that was counted: it is no new storage
        for given in tree_leaves((args, kwargs or {})):
            if isinstance(given, torch.Tensor):
                self._note(given, counts=False)
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, torch.Tensor):
                self._note(each, counts=True)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return found

    def _note(self, tensor: torch.Tensor, *, counts: bool) -> None:
        if tensor.layout is not torch.strided:
            return  # a sparse matrix is made of tensors that were counted
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._seen.get(key)
        if known is not None and known() is not None:
            return
        size = storage.nbytes() if counts else 0
        self.live_bytes += size

        def forget(_: Any) -> None:
            self.live_bytes -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, forget)
