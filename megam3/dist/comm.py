"""The few collective calls the rest of the package needs. All of them also work with no process group, where
they cost nothing.

Callers never ask "am I distributed?": one rank without a process group is a world of size 1 and no call below
communicates there. Tensors may live on any device; with NCCL the transfer goes through the current CUDA
device, with gloo through the CPU.
"""

import json
import logging
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megam3.errors import ConfigError

LOST_PEER_PHRASES = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""What gloo and NCCL say when another rank is gone."""

TIMEOUT_PHRASES = ("Timed out", "timed out", "timeout", "Gloo connectFullMesh failed")
"""What gloo and the ranks' store say when another rank did not answer."""


class MeetingError(ConfigError):
    """The ranks did not meet in time: one is missing, or the address leads nowhere. Worth another start."""


class RankAddress(Protocol):
    """What `start` needs to know of a rank; `megam3.dist.env.RankInfo` has it."""

    @property
    def rank(self) -> int:
        """0 … world_size-1."""
        ...

    @property
    def world_size(self) -> int:
        """W."""
        ...

    @property
    def master_addr(self) -> str:
        """Host of rank 0."""
        ...

    @property
    def master_port(self) -> int:
        """Port rank 0 listens on."""
        ...


def start(rank_info: RankAddress, backend: str, timeout_seconds: float = 1800.0) -> None:
    """Join the process group of this run. Does nothing for a world of one, or when a group is already there.

    Raises:
        ConfigError: rank 0 cannot listen on the port, usually because another run on its machine does.
        MeetingError: not all ranks came within `timeout_seconds`.
    """
    if rank_info.world_size == 1 or dist.is_initialized():
        return
    try:
        dist.init_process_group(
            backend,
            init_method=f"tcp://{rank_info.master_addr}:{rank_info.master_port}",
            rank=rank_info.rank,
            world_size=rank_info.world_size,
            timeout=timedelta(seconds=timeout_seconds),
        )
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            rule = f"another process on {rank_info.master_addr} listens on this port"
            remedy = "choose a free one: `deepspeed --master_port N …`, or MASTER_PORT"
            raise ConfigError("MASTER_PORT", rank_info.master_port, rule, remedy) from None
        if not is_timeout(error):
            raise
        where = f"{rank_info.master_addr}:{rank_info.master_port}"
        waited = f"{timeout_seconds:.0f} s ({_first_line(error)})"
        rule = f"the {rank_info.world_size} ranks did not meet there within {waited}"
        remedy = (
            "look for the rank that is missing; where all are up, the address or the network is wrong"
            " (MASTER_ADDR, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME in slurm/env.sh)"
        )
        raise MeetingError("MASTER_ADDR", where, rule, remedy) from None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0].rstrip(".")


def stop() -> None:
    """Leave the process group, when there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def leave(code: int) -> None:
    """End this process at once with `code` when there are other ranks; return when there are none.

    An ordinary exit would destroy the process group, and that waits for peers that sit in a collective call
    which this rank will never join: nobody would end, and the message would stay in a buffer. What was said
    is flushed first. The launcher (`srun --kill-on-bad-exit`, deepspeed, torchrun) sees the code and ends the
    rest.
    """
    if not is_grouped():
        return
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective call failed because another rank has ended, whose own message tells why."""
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in LOST_PEER_PHRASES)


def is_timeout(error: BaseException) -> bool:
    """Whether a call failed because another rank did not answer in time."""
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in TIMEOUT_PHRASES)


def is_grouped() -> bool:
    """Whether there is more than one rank to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This rank, from 0."""
    return dist.get_rank() if is_grouped() else 0


def world_size() -> int:
    """Number of ranks W."""
    return dist.get_world_size() if is_grouped() else 1


def is_main() -> bool:
    """Whether this is rank 0, which writes logs and files."""
    return rank() == 0


def transfer_device() -> torch.device:
    """Device that collective calls read and write: the current CUDA device with NCCL, else the CPU."""
    if is_grouped() and "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def barrier() -> None:
    """Wait for every rank."""
    if is_grouped():
        dist.barrier()


def copy_pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the host by a copy that the host does not wait for.

    A plain copy from pageable memory waits until all that is queued on the device is done.
    """
    if device.type == "cpu" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def _all_reduce(tensor: Tensor, op: Any) -> Tensor:
    if not is_grouped():
        return tensor.detach().clone()
    # sums of low-precision floats are taken in fp32; integers and bool flags keep their own type
    wide = tensor.detach().float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.detach()
    device = transfer_device()
    moved = wide.clone() if wide.device.type == device.type else copy_pinned(wide, device)
    moved = moved.contiguous()
    dist.all_reduce(moved, op=op)
    return moved.to(device=tensor.device, dtype=tensor.dtype)


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Elementwise sum over ranks, a new tensor without graph."""
    return _all_reduce(tensor, dist.ReduceOp.SUM)


def all_reduce_max(tensor: Tensor) -> Tensor:
    """Elementwise maximum over ranks, a new tensor without graph."""
    return _all_reduce(tensor, dist.ReduceOp.MAX)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank; every rank gets the same answer."""
    return bool(all_reduce_max(torch.tensor(int(flag))).item())


def max_over_ranks(value: int) -> int:
    """Largest value of any rank."""
    return int(all_reduce_max(torch.tensor(value, dtype=torch.int64)).item())


def all_gather_ints(values: Sequence[int]) -> list[list[int]]:
    """Every rank's list, in rank order. All ranks pass equally many numbers."""
    if not is_grouped():
        return [[int(v) for v in values]]
    return all_gather_rows(torch.tensor(list(values), dtype=torch.int64)).tolist()


def all_gather_rows(values_F: Tensor) -> Tensor:
    """Every rank's vector as a row, rows_WF in rank order, without graph. All ranks pass equally many numbers
    of one dtype."""
    if not is_grouped():
        return values_F.detach()[None]
    own = copy_pinned(values_F.detach(), transfer_device()).contiguous()
    gathered = own.new_empty(world_size() * own.numel())
    dist.all_gather_into_tensor(gathered, own)
    return gathered.view(world_size(), -1).to(values_F.device)


def gather_objects_json(obj: Any) -> list[Any]:
    """Every rank's object, in rank order, on every rank; travels as JSON bytes, so that nothing is ever
    unpickled.

    Raises:
        TypeError: the object is not JSON (numbers, strings, lists, dicts with string keys, None).
    """
    if not is_grouped():
        return [json.loads(json.dumps(obj))]
    written = torch.frombuffer(bytearray(json.dumps(obj).encode()), dtype=torch.uint8)
    payload = copy_pinned(written, transfer_device())
    counts = [row[0] for row in all_gather_ints([payload.numel()])]
    padded = payload.new_zeros(max(counts))
    padded[: payload.numel()] = payload
    return [
        json.loads(bytes(row[:count].tolist())) for row, count in zip(all_gather_rows(padded).cpu(), counts)
    ]
