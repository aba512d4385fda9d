"""Notes the collective calls that run while it is active, with where in megam3 they came from."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

import megam3

PACKAGE = Path(megam3.__file__).parent

NAMES = (
    "all_reduce",
    "all_gather_into_tensor",
    "all_gather",
    "_all_gather_base",
    "all_to_all",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "_reduce_scatter_base",
)
"""Names of torch.distributed under which this package and DeepSpeed communicate."""


def install(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count calls as "file in megam3:operation"; those of DeepSpeed as "engine:operation".

    A collective that another one is made of counts once.
    """
    counts: Counter[str] = Counter()
    inside: list[str] = []

    def counted(name: str, function):
        def call(*args, **kwargs):
            if not inside:
                counts[f"{_caller()}:{name}"] += 1
            inside.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()

        return call

    for name in NAMES:
        if hasattr(dist, name):
            monkeypatch.setattr(dist, name, counted(name, getattr(dist, name)))
    return counts


def _caller() -> str:
    """The innermost file that is DeepSpeed's or this package's beyond the wrappers in megam3/dist/."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "deepspeed" in path.parts:
            return "engine"
        if path.is_relative_to(PACKAGE) and path.parent.name != "dist":
            return path.relative_to(PACKAGE).as_posix()
        frame = frame.f_back
    return "autograd"
