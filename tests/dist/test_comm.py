import socket
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist

from megam3.dist import comm
from megam3.dist.env import free_port
from megam3.errors import ConfigError
from tests.ranks import run_ranks


@dataclass(frozen=True)
class _Address:
    rank: int
    world_size: int
    master_addr: str = "localhost"
    master_port: int = 29500


def _collectives():
    rank, world = comm.rank(), comm.world_size()
    own = torch.tensor([rank, -rank], dtype=torch.bfloat16)
    assert comm.all_reduce_sum(own).tolist() == [3.0, -3.0]
    assert comm.all_reduce_max(own).tolist() == [2.0, 0.0]
    assert own.tolist() == [rank, -rank]
    assert comm.any_rank(rank == 1)
    assert not comm.any_rank(False)
    assert comm.max_over_ranks(rank * 7) == 14
    assert comm.all_gather_ints([rank, 10 * rank]) == [[0, 0], [1, 10], [2, 20]]
    assert comm.all_gather_rows(torch.tensor([rank / 4, 1.0], dtype=torch.float64)).tolist() == [
        [0.0, 1.0],
        [0.25, 1.0],
        [0.5, 1.0],
    ]
    told = comm.gather_objects_json({"rank": rank, "text": "ü" * rank, "none": None})
    assert told == [{"rank": r, "text": "ü" * r, "none": None} for r in range(3)]
    assert comm.is_main() == (rank == 0)
    comm.barrier()
    return [rank, world]


@pytest.mark.ranks
def test_collectives_on_three_ranks():
    assert run_ranks(_collectives, 3) == [[0, 3], [1, 3], [2, 3]]


def _joins(port):
    rank = dist.get_rank()
    comm.stop()
    comm.start(_Address(rank, 2, master_port=port), "gloo", timeout_seconds=60)
    comm.start(_Address(rank, 2, master_port=port), "gloo")
    total = comm.all_reduce_sum(torch.tensor(rank + 1)).item()
    return [comm.rank(), total]


@pytest.mark.ranks
def test_start_joins_the_group_the_environment_describes():
    assert run_ranks(_joins, 2, free_port()) == [[0, 3], [1, 3]]


def _fails_on_rank_one():
    assert comm.rank() != 1, "rank one is unwell"
    comm.barrier()


@pytest.mark.ranks
def test_a_failing_rank_tells_its_story():
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed:.*rank one is unwell"):
        run_ranks(_fails_on_rank_one, 2)


def test_without_a_group():
    comm.start(_Address(0, 1), "gloo")
    assert (comm.rank(), comm.world_size(), comm.is_main()) == (0, 1, True)
    tensor = torch.tensor([1.0, 2.0])
    assert comm.all_reduce_sum(tensor).tolist() == comm.all_reduce_max(tensor).tolist() == [1.0, 2.0]
    assert comm.all_gather_ints([1, 2]) == [[1, 2]]
    assert comm.all_gather_rows(tensor).tolist() == [[1.0, 2.0]]
    assert comm.any_rank(True)
    assert comm.gather_objects_json({"a": [1]}) == [{"a": [1]}]
    with pytest.raises(TypeError):
        comm.gather_objects_json({1, 2})
    comm.barrier()
    comm.stop()


def test_a_port_in_use_is_told_before_anything_hangs():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        address = _Address(0, 2, "127.0.0.1", port)
        with pytest.raises(
            ConfigError,
            match=rf"MASTER_PORT = {port}: another process on 127.0.0.1 listens.*deepspeed --master_port N",
        ):
            comm.start(address, "gloo")


@pytest.mark.parametrize(("rank", "reason"), [(0, "waiting for clients"), (1, "trying to connect")])
def test_ranks_that_do_not_meet_are_told_so(rank: int, reason: str) -> None:
    address = _Address(rank, 2, "127.0.0.1", free_port())
    with pytest.raises(
        comm.MeetingError,
        match=rf"MASTER_ADDR = '127.0.0.1:\d+': the 2 ranks did not meet there within 1 s \(.*{reason}.*\);"
        r" look for the rank that is missing; .*GLOO_SOCKET_IFNAME",
    ):
        comm.start(address, "gloo", timeout_seconds=1)


def test_a_lost_peer_is_told_from_our_own_faults():
    assert comm.is_lost_peer(
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
    )
    assert not comm.is_lost_peer(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"))
    assert not comm.is_lost_peer(ValueError("Connection closed by peer"))
