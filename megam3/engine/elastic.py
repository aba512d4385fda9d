"""Give an engine the weights and moments that another one saved, whatever the two world sizes and ZeRO
stages.

Both sides speak in whole fp32 tensors by parameter name: `consolidate.SavedStates` joins what was cut, and
this file cuts for the engine at hand, one parameter at a time, each rank for itself and without any
collective but the last.
"""

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.utils import (
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch.nn.functional import pad

from megam3.dist import comm
from megam3.engine.adamw import step_count
from megam3.engine.consolidate import MOMENTS, SavedStates
from megam3.engine.swapped import begin_moments, states_in_sight


@torch.no_grad()
def restore(
    saved: SavedStates, module: nn.Module, zero: Any, adamw: torch.optim.Optimizer, names: Sequence[str]
) -> None:
    """Overwrite weights (in the model's precision and their fp32 masters), moments and step count;
    collective.

    Args:
        module: the model inside the engine.
        zero: DeepSpeed's optimizer; at stage 0 in fp32 it is `adamw` itself.
        adamw: the torch optimizer inside.
        names: of the optimizer's parameters, in its order (before DeepSpeed flattened them).
    """
    parameters = dict(module.named_parameters())
    assert set(saved.names) == set(names), f"parameters differ: {sorted(set(saved.names) ^ set(names))[:4]}"
    partitioned = hasattr(parameters[names[0]], "ds_id")
    if partitioned and zero.persistent_parameters:
        # small parameters that ZeRO-3 keeps whole: drop the whole copies, or the new partitions would go
        # unseen
        zero.persistent_parameters[0].partition(zero.persistent_parameters)
    if partitioned:
        with states_in_sight(zero, writable=True):
            _start_moments(zero.fp32_partitioned_groups_flat, adamw, saved.adam_steps)
            begin_moments(zero)
            _fill_partitions(saved, parameters, zero, adamw)
        zero.checkpoint_event_epilogue()  # the kept ones come back whole
    elif hasattr(parameters[names[0]], "_hp_mapping"):
        _start_moments(zero.single_partition_of_fp32_groups, adamw, saved.adam_steps)
        # lets every parameter know its piece of the moments, as the first step would
        zero._lazy_init_hp_params_optimizer_state()
        _fill_flat_groups(saved, parameters)
    else:
        masters = [master for group in adamw.param_groups for master in group["params"]]
        _start_moments(masters, adamw, saved.adam_steps)
        _fill_whole(saved, parameters, dict(zip(names, masters, strict=True)), adamw)


def _start_moments(masters: Sequence[Tensor], adamw: torch.optim.Optimizer, steps: float) -> None:
    """AdamW allocates its state in its first step."""
    for master in masters:
        adamw.state[master] = {kind: torch.zeros_like(master, requires_grad=False) for kind in MOMENTS}
        adamw.state[master]["step"] = step_count(steps, master, adamw)


def _fill_partitions(
    saved: SavedStates, parameters: dict[str, nn.Parameter], zero: Any, adamw: torch.optim.Optimizer
) -> None:
    """ZeRO-3: this rank's slice of every parameter."""
    for name in saved.names:
        parameter = parameters[name]
        partition: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        weight = _own_slice(saved.read(name), partition)
        partition.data.copy_(weight)
        # not by DeepSpeed's safe_set_local…: with states in files it would read and write a whole sub-group
        # for each parameter and kind
        sub_group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        master = zero.fp32_partitioned_groups_flat[sub_group]
        own = slice(offset, offset + weight.numel())
        master.data[own] = weight
        for kind in saved.moments:
            adamw.state[master][kind].data[own] = _own_slice(saved.read(name, kind), partition)


def _own_slice(value: Tensor, partition: Tensor) -> Tensor:
    size = partition.numel()
    return pad(value.flatten(), (0, size * comm.world_size() - value.numel()))[size * comm.rank() :][:size]


def _fill_flat_groups(saved: SavedStates, parameters: dict[str, nn.Parameter]) -> None:
    """ZeRO-1 and 2: the whole weight, and whatever piece of the fp32 state lies on this rank."""
    for name in saved.names:
        parameter, weight = parameters[name], saved.read(name)
        parameter.data.copy_(weight)
        safe_set_full_fp32_param(parameter, weight)
        for kind in saved.moments:
            safe_set_full_optimizer_state(parameter, saved.read(name, kind), kind)


def _fill_whole(
    saved: SavedStates,
    parameters: dict[str, nn.Parameter],
    masters: dict[str, Tensor],
    adamw: torch.optim.Optimizer,
) -> None:
    """Stage 0: AdamW steps the parameters themselves or, under bf16, their fp32 masters."""
    for name, master in masters.items():
        weight = saved.read(name)
        parameters[name].data.copy_(weight)
        master.data.copy_(weight)
        for kind in saved.moments:
            adamw.state[master][kind].copy_(saved.read(name, kind))
