"""Read what an engine saved, parameter by parameter and by name, without ranks or devices: fp32 weights and
AdamW's moments.

A DeepSpeed checkpoint is cut by world size and ZeRO stage. This file describes every cut in one way: some
streams, each the concatenation of flat tensors, and for each parameter its places (stream, offset, count) in
them.

    stage 0        one stream per parameter: the whole tensor, in the main rank's file
    stage 1 and 2  one stream per parameter group: the partitions of all ranks, one after another; a parameter
    is one place
    stage 3        one stream per rank: its sub-groups, one after another; a parameter is one place in each
                   (the last one padded)

Weights and both moments are cut alike. Files are memory-mapped: reading one parameter touches its own bytes
only.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

TAG = "engine"
"""Folder of DeepSpeed's own files inside a checkpoint."""

NAMES = "optimizer_names"
"""Where an engine records the names of the optimizer's parameters, in its order; stage 0 keeps no others."""

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square."""

WEIGHT = "weight"

SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What moves in DeepSpeed's DynamicLossScaler."""

Place = tuple[int, int, int]
"""(stream, offset, count)."""


@contextlib.contextmanager
def weights_only_loads() -> Iterator[None]:
    """Make every torch.load inside refuse pickled code. DeepSpeed asks for full pickles; its files need just
    these four types."""
    name, before = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals(
            [fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler]
        ):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


class SavedStates:
    """The parameters of one checkpoint folder: `read(name, kind)`, kind `WEIGHT` or one of `MOMENTS`."""

    def __init__(self, folder: str, files: Sequence[str] | None = None):
        """Open the files of `folder` (any ZeRO stage and world size); tensors are read when asked for.

        Args:
            files: names of `list_files`, where somebody has listed them already.
        """
        root = os.path.join(folder, TAG)
        files = list_files(folder) if files is None else files
        shards = [
            _load(os.path.join(root, file))["optimizer_state_dict"]
            for file in files
            if file.endswith("_optim_states.pt")
        ]
        models = [os.path.join(root, file) for file in files if file.endswith("_model_states.pt")]
        self._model = _load(models[0])
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, list[Place]] = {}
        self._streams: dict[str, list[list[Tensor]]] = {}
        if not shards:
            states = self._open_whole()
        elif shards[0]["zero_stage"] == ZeroStageEnum.weights:
            states = self._open_sub_groups(shards)
        else:
            states = self._open_groups(shards)
        self.scaler = _scaler_state(shards[0]) if shards else {}
        """Where fp16's loss scaler was; empty in other precisions. Its settings are the recipe's."""
        self._frozen = _join_frozen(models) if shards and len(models) == len(shards) else {}
        # one count for all: bias correction differs by it, and a checkpoint that mixes two is damaged
        steps = {float(state["step"]) for state in states}
        assert len(steps) <= 1, f"AdamW counted {steps} steps in one checkpoint"
        self.adam_steps = steps.pop() if steps else 0.0
        """Updates AdamW has made: skipped steps are not among them."""

    @property
    def names(self) -> tuple[str, ...]:
        """Trained parameters, by their names in M3Model."""
        return tuple(self._places)

    def read(self, name: str, kind: str = WEIGHT) -> Tensor:
        """One parameter's fp32 weight or moment in its full shape, on the CPU; a copy."""
        streams, shape = self._streams[kind], self._shapes[name]
        # a parameter may lie in one stream or, at stage 3, in a piece of every rank's; the last piece carries
        # padding
        flat = torch.cat(
            [
                piece
                for stream, offset, count in self._places[name]
                for piece in _cut(streams[stream], offset, count)
            ]
        )
        return flat[: torch.Size(shape).numel()].reshape(shape).float()

    @property
    def moments(self) -> tuple[str, ...]:
        """Kinds of moments there are; none before AdamW's first step."""
        return tuple(kind for kind in MOMENTS if kind in self._streams)

    def untrained(self) -> dict[str, Tensor]:
        """Buffers, frozen parameters, and second names of shared parameters."""
        module, shared = self._model["module"], self._model.get("shared_params") or {}
        own = {
            name: tensor.detach().clone().float()
            for name, tensor in module.items()
            if name not in self._places and tensor.numel()
        }
        return own | self._frozen | {alias: self.read(name) for alias, name in dict(shared).items()}

    def _open_whole(self) -> list[dict]:
        optimizer, names = self._model["optimizer"], self._model[NAMES]
        # under bf16 a wrapper keeps fp32 masters beside the module's rounded weights
        states = optimizer.get("optimizer_state_dict", optimizer)["state"]
        masters = (
            [x for group in optimizer["fp32_groups"] for x in group] if "fp32_groups" in optimizer else None
        )
        weights = masters or [self._model["module"][name] for name in names]
        for index, (name, weight) in enumerate(zip(names, weights, strict=True)):
            self._shapes[name], self._places[name] = tuple(weight.shape), [(index, 0, weight.numel())]
        self._streams[WEIGHT] = [[weight.flatten()] for weight in weights]
        if states:
            for kind in MOMENTS:
                self._streams[kind] = [[states[index][kind].flatten()] for index in range(len(names))]
        return list(states.values())

    def _open_groups(self, shards: Sequence[dict]) -> list[dict]:
        # empty when AdamW has not stepped yet: every step so far was skipped
        states = [
            [state for _, state in sorted(shard["base_optimizer_state"]["state"].items())] for shard in shards
        ]
        weights = [shard["single_partition_of_fp32_groups"] for shard in shards]
        self._streams[WEIGHT] = [list(parts) for parts in zip(*weights, strict=True)]
        for kind in MOMENTS if states[0] else ():
            # the moments still have the last rank's padding, which the weights have lost
            moments = [
                [state[kind][: weight.numel()] for state, weight in zip(*rank, strict=True)]
                for rank in zip(states, weights, strict=True)
            ]
            self._streams[kind] = [list(parts) for parts in zip(*moments, strict=True)]
        for stream, shapes in enumerate(self._model["param_shapes"]):
            # DeepSpeed lays a group's parameters end to end, each padded to the alignment of the reduction
            paddings, offset = (shards[0].get("param_alignment_paddings") or {}), 0
            for index, (name, shape) in enumerate(shapes.items()):
                self._shapes[name], self._places[name] = tuple(shape), [(stream, offset, shape.numel())]
                offset += shape.numel() + (paddings[stream][index] if paddings else 0)
        return [state for rank in states for state in rank]

    def _open_sub_groups(self, shards: Sequence[dict]) -> list[dict]:
        states = [
            [state for _, state in sorted(shard["optimizer_state_dict"]["state"].items())] for shard in shards
        ]
        self._streams[WEIGHT] = [list(shard["fp32_flat_groups"]) for shard in shards]
        for kind in MOMENTS if states[0] else ():
            self._streams[kind] = [[state[kind] for state in rank] for rank in states]
        offset = 0
        for shapes in self._model["param_shapes"]:
            for name, shape in shapes.items():
                # each rank holds an equal piece, rounded up: what exceeds the parameter is padding
                count = -(-shape.numel() // len(shards))
                self._shapes[name] = tuple(shape)
                self._places[name] = [(rank, offset, count) for rank in range(len(shards))]
                offset += count
        return [state for rank in states for state in rank]


def list_files(folder: str) -> list[str]:
    """Names of DeepSpeed's files in the checkpoint folder `folder`, by rank."""
    return sorted(os.listdir(os.path.join(folder, TAG)), key=_rank_in_name)


def consolidate(folder: str) -> dict[str, Tensor]:
    """fp32 weights by parameter name from the checkpoint folder `folder` (any ZeRO stage and world size), on
    the CPU."""
    saved = SavedStates(folder)
    return {name: saved.read(name) for name in saved.names} | saved.untrained()


def _scaler_state(shard: dict) -> dict[str, Any]:
    scaler = shard.get("loss_scaler")
    if not isinstance(scaler, DynamicLossScaler):
        return {}
    return {name: getattr(scaler, name) for name in SCALER_STATE}


def _join_frozen(files: Sequence[str]) -> dict[str, Tensor]:
    """Frozen parameters that stage 3 has cut: each rank's file holds an equal piece, the last one padded."""
    shapes = _load(files[0]).get("frozen_param_shapes") or {}
    if not shapes or _load(files[0]).get("frozen_param_fragments") is None:
        return {}
    pieces = [_load(file)["frozen_param_fragments"] for file in files]
    return {
        name: torch.cat([piece[name].flatten() for piece in pieces])[: torch.Size(shape).numel()]
        .reshape(tuple(shape))
        .float()
        for name, shape in shapes.items()
    }


def _cut(tensors: Sequence[Tensor], offset: int, count: int) -> Iterator[Tensor]:
    """Entries offset … offset+count-1 of the concatenation of flat `tensors`, piece by piece."""
    for tensor in tensors:
        if count > 0 and offset < tensor.numel():
            piece = tensor.detach()[offset : offset + count]
            yield piece
            count -= piece.numel()
        offset = max(0, offset - tensor.numel())
    assert count == 0, f"a parameter reaches {count} entries beyond its stream"


def _load(path: str) -> dict[str, Any]:
    with weights_only_loads():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _rank_in_name(file: str) -> tuple[int, str]:
    """zero_pp_rank_10_mp_rank_00_optim_states.pt sorts after rank 9."""
    digits = file.partition("pp_rank_")[2].partition("_")[0]
    return int(digits) if digits else 0, file
