"""A device of its own type whose tensors live in CPU memory, for counting what a real one would have to do.

    with Pretend() as device:
        move(model); objective.run(engine, batch.to(device.device), progress)
    device.syncs         what made the host wait for the device, in order: (operator, where in megam3 it was
    called) device.launches      operators that would start a kernel

Data, autograd and device checks are real: a tensor is a wrapper that claims device "pretend:0" around a CPU
tensor; every operator is unwrapped, run and wrapped again. As on a GPU,

- operators whose result's size depends on values (nonzero, unique, a boolean index …), `item`, and copies to
  the host wait for the device; so do copies from host memory that is not pinned;
- a host tensor among device tensors is an error, unless it is a single number.

autograd counts the devices at the first backward pass of a process, so use this in a fresh one
(`tests/ranks.py`).

Sparse CSR tensors cannot be wrapped: the functions of `megam3.scoring.sparse` run unwrapped as a whole. They
synchronise nowhere but inside cuSPARSE, which does not wait for the host.
"""

import functools
import sys
from collections import Counter
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"

WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "bincount",
    "equal",
    "is_nonzero",
}
"""Operators of torch that wait for the device on CUDA, because their result or its size is needed on the
host."""

VIEWS_ONLY = {
    "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
    "detach", "alias", "as_strided", "split", "split_with_sizes", "unbind", "lift_fresh", "_reshape_alias",
}  # fmt: skip
"""Operators that launch nothing."""


@functools.lru_cache
def _register() -> torch.device:
    _setup_privateuseone_for_python_backend(NAME)
    return torch.device(NAME, 0)


class PretendTensor(Tensor):
    """Claims the pretend device; `inner` holds the numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "PretendTensor":
        wrapper = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=_register(),
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on a device tensor outside of Pretend()")

    def __getitem__(self, index):
        # a list becomes a tensor on the host that torch copies without its dispatcher
        if isinstance(index, list):
            index = torch.tensor(index).to(self.device)
        return super().__getitem__(index)

    def new_tensor(self, data, **options):
        # made on the host and copied without its dispatcher
        return torch.tensor(data, **{"dtype": self.dtype, **options}).to(self.device)

    def tolist(self) -> list:
        # torch reads values for a list without its dispatcher
        return self.to("cpu").tolist()

    def __repr__(self) -> str:
        return f"PretendTensor({self.inner})"


def _is_pretend(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _caller() -> str:
    """Function of megam3 that called the operator."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("megam3."):
            return f"{name.removeprefix('megam3.')}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "a backward pass"


class Pretend(TorchDispatchMode):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.device = _register()
        self.syncs: list[tuple[str, str]] = []
        self.launches = 0
        # held, so that no pageable tensor comes to lie at the same place
        self.pinned: dict[int, Tensor] = {}

    def __enter__(self) -> "Pretend":
        plain = self._tensor = torch.tensor

        def tensor(data, *, device=None, **options):
            # torch makes it on the host and copies it without its dispatcher
            made = plain(data, **options)
            return made if device is None else made.to(device)

        torch.tensor = tensor
        return super().__enter__()

    def __exit__(self, *reason) -> None:
        torch.tensor = self._tensor
        super().__exit__(*reason)

    def pin(self, tensor: Tensor) -> Tensor:
        """Count the host tensor as page-locked."""
        self.pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def sites(self) -> dict[str, int]:
        """How often each function waited."""
        return dict(Counter(where for _, where in self.syncs))

    def _wait(self, name: str) -> None:
        self.syncs.append((name, _caller()))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        flat = pytree.tree_leaves((args, kwargs))
        ours = [x for x in flat if isinstance(x, PretendTensor)]
        wanted = kwargs.get("device")
        if not ours and not _is_pretend(wanted):
            return func(*args, **kwargs)
        to_host = name == "_to_copy" and wanted is not None and not _is_pretend(wanted)
        hosts = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, PretendTensor)]
        self._judge(name, args, kwargs, hosts, to_host)
        if name not in VIEWS_ONLY:
            self.launches += 1
        owner = {id(x.inner): x for x in ours}
        if _is_pretend(wanted):
            kwargs["device"] = "cpu"
        args, kwargs = pytree.tree_map_only(PretendTensor, lambda x: x.inner, (args, kwargs))
        result = func(*args, **kwargs)
        if to_host:
            # a copy even where torch would hand the same memory back
            return result
        # an operator that works in place gives back the very tensor it was given
        return pytree.tree_map_only(
            Tensor, lambda x: owner[id(x)] if id(x) in owner else PretendTensor(x), result
        )

    def _judge(self, name: str, args: tuple, kwargs: dict, hosts: list[Tensor], to_host: bool) -> None:
        is_copy = name in ("_to_copy", "copy_")
        if to_host or (name == "copy_" and not isinstance(args[0], PretendTensor)):
            self._wait(f"{name} to the host")
        elif is_copy and hosts:
            if any(x.untyped_storage().data_ptr() not in self.pinned for x in hosts):
                self._wait(f"{name} from pageable memory")
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [x for x in pytree.tree_leaves(args[1]) if isinstance(x, Tensor)]
            if any(x.dtype in (torch.bool, torch.uint8) for x in indices):
                self._wait(f"{name} by a mask")
            if any(not isinstance(x, PretendTensor) for x in indices):
                self._wait(f"{name} by host indices")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None and len(args) < 2:
            self._wait("repeat_interleave of unknown size")
        elif name in WAITS:
            self._wait(name)
        elif name == "segment_reduce" and not kwargs.get("unsafe"):
            # it reads the least length and the sum of all
            self._wait("segment_reduce checks its lengths")
            self._wait("segment_reduce checks its lengths")
        elif name == "lift_fresh":
            return
        else:
            strangers = [tuple(x.shape) for x in hosts if x.dim() > 0]
            assert not strangers, f"{name}: host tensors {strangers} among device tensors, in {_caller()}"


def move(module: nn.Module) -> nn.Module:
    """Parameters and buffers of `module` on the pretend device, in place; under `Pretend()`."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = nn.Parameter(PretendTensor(parameter.detach().clone()))
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = PretendTensor(buffer.clone())
    return module


def unwrapped(function):
    """`function` run on the inner tensors as one operator."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        args, kwargs = pytree.tree_map_only(PretendTensor, lambda x: x.inner, (args, kwargs))
        return pytree.tree_map_only(Tensor, PretendTensor, function(*args, **kwargs))

    return call
