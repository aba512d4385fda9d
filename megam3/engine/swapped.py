"""Optimizer states that DeepSpeed keeps in files on a disk (`offload_optimizer.device: nvme`), in sight as
tensors while a checkpoint is written or read.

Between two updates a sub-group of such an engine has empty tensors; its numbers lie in a file each:

    NVME_PATH/zero_stage_3/optimizer/rank0/0_65.tensor.swp             fp32 weights
                                           exp_avg-0_65.tensor.swp     moments, from the first update on

DeepSpeed's own checkpoints copy these files beside empty weights: nothing but equally many ranks can read
them, no export finds a weight in them, and what it loads again computes the next step differently (measured,
docs/experiments.md). Here the files are mapped into memory instead: what is saved is a checkpoint of stage 3
like any other, and what is restored goes to the disk, both page by page, whatever their size.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from torch import Tensor

from megam3.engine.compiled_operators import load_operator
from megam3.errors import ConfigError


def check_disk(ds_config: dict[str, Any], template: str, load: Callable[[], Any] | None = None) -> None:
    """Make the folder of states on a disk and load the operator that reads and writes there, where
    `ds_config` keeps any.

    Args:
        template: engine.template, for the messages.
        load: builds and loads DeepSpeed's operator; None: its own builder.

    Raises:
        ConfigError: the folder cannot be made, or the operator cannot be built here.
    """
    offloaded = ds_config["zero_optimization"].get("offload_optimizer") or {}
    if offloaded.get("device") != "nvme":
        return
    field = f"engine.template = {template}: offload_optimizer.nvme_path"
    try:
        Path(offloaded["nvme_path"]).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        rule = f"cannot be made ({error.strerror})"
        raise ConfigError(field, offloaded["nvme_path"], rule, "name a folder on a local disk") from None
    load_operator(
        "async_io",
        load or AsyncIOBuilder().load,
        what="DeepSpeed's async_io, which keeps optimizer states on a disk,",
        field="engine.template",
        value=template,
        remedy="install libaio-dev, g++ and ninja, or use zero3_offload",
    )


def keeps_states_in_files(zero: Any) -> bool:
    """Whether DeepSpeed's optimizer `zero` swaps its states to a disk."""
    return getattr(zero, "optimizer_swapper", None) is not None


@contextmanager
def states_in_sight(zero: Any, *, writable: bool = False) -> Iterator[None]:
    """Inside, weights and moments that lie in files are tensors; nothing where there are no such files.

    Args:
        writable: changes go to the files; otherwise they are for reading.
    """
    if not keeps_states_in_files(zero):
        yield
        return
    subgroups = zero.optimizer_swapper.swap_params_info.values()
    try:
        for subgroup in subgroups:
            for held in subgroup.tensors:
                held.compute_tensor.data = _map(held.swap_path, subgroup.numel(), writable=writable)
        yield
    finally:
        for subgroup in subgroups:
            subgroup.release_memory()
            for held in subgroup.tensors if writable else ():
                _flush(held.swap_path)


def begin_moments(zero: Any) -> None:
    """Give moments that were just made (`torch.zeros_like`, whose memory nobody has touched) files of zeros;
    inside of `states_in_sight(writable=True)`."""
    if not keeps_states_in_files(zero):
        return
    swapper = zero.optimizer_swapper
    # those of the states that were there before
    swapper.purge_state()
    for subgroup in swapper.swap_params_info.values():
        master = subgroup.tensors[0].compute_tensor
        subgroup.add_state_tensors(swapper._get_state_tensors(master))
        for held in subgroup.tensors[1:]:
            if os.path.exists(held.swap_path):
                os.unlink(held.swap_path)
            # as long as DeepSpeed reads it, in whole blocks
            whole = _map(held.swap_path, swapper._io_aligned_numel(subgroup.numel()), writable=True)
            held.compute_tensor.data = whole[: subgroup.numel()]


def _map(path: str, numel: int, *, writable: bool) -> Tensor:
    return torch.from_file(path, shared=writable, size=numel, dtype=torch.float32)


def _flush(path: str) -> None:
    """DeepSpeed reads past the page cache."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
