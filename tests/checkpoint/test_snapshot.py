"""A copy of nested tensors: equal bytes once saved, untouched by what happens to the original, and its size
known beforehand."""

from collections import OrderedDict
from pathlib import Path

import torch

from megam3.checkpoint import snapshot as module
from megam3.checkpoint.snapshot import HostBuffers, snapshot, storages_of


def make_state() -> dict:
    flat = torch.arange(1000.0)
    modules = OrderedDict(weight=flat[10:30].view(4, 5), tail=flat[990:], half=torch.ones(3).bfloat16())
    modules._metadata = {"version": 1}
    shared = [1, "x"]
    return {
        "module": modules,
        "transposed": torch.arange(6).view(2, 3).t(),
        "groups": [{"lr": 1e-3, "shape": torch.Size([2, 3]), "betas": (0.9, flat[:1])}],
        "empty": torch.empty(0),
        "parameter": torch.nn.Parameter(torch.ones(2), requires_grad=False),
        "shared": [shared, shared],
    }


def test_a_copy_is_saved_as_the_very_bytes_of_the_original(tmp_path: Path) -> None:
    state = make_state()
    for name, value in (("original", state), ("copy", snapshot(state, HostBuffers()))):
        (tmp_path / name).mkdir()
        torch.save(value, tmp_path / name / "state.pt")
    assert (tmp_path / "copy" / "state.pt").read_bytes() == (tmp_path / "original" / "state.pt").read_bytes()


def test_later_steps_do_not_reach_the_copy() -> None:
    state = make_state()
    copied = snapshot(state, HostBuffers())
    state["module"]["weight"].fill_(-1.0)
    state["groups"][0]["lr"] = 0.0
    state["shared"][0].append(2)
    assert torch.equal(copied["module"]["weight"], torch.arange(10.0, 30.0).view(4, 5))
    assert copied["groups"][0]["lr"] == 1e-3
    assert copied["shared"][0] == [1, "x"]
    assert copied["module"]._metadata == {"version": 1}


def test_tensors_that_share_memory_are_counted_and_copied_once() -> None:
    state = make_state()
    # flat 4000, half 6, transposed 48, parameter 8
    assert HostBuffers().missing_bytes(storages_of(state)) == 4000 + 6 + 48 + 8
    copied = snapshot(state, HostBuffers())
    assert HostBuffers().missing_bytes(storages_of(copied)) == 4000 + 6 + 48 + 8
    own = [copied["module"]["weight"], copied["module"]["tail"], copied["groups"][0]["betas"][1]]
    assert len({tensor.untyped_storage().data_ptr() for tensor in own}) == 1


class StandIn:
    """A GPU's storage as far as a copy looks at it."""

    device = torch.device("cuda")

    def __init__(self, values: list[int]):
        self.values = torch.tensor(values, dtype=torch.uint8)

    def nbytes(self) -> int:
        return len(self.values)


def test_page_locked_memory_is_used_again_once_it_was_written(monkeypatch) -> None:
    made = []

    class Target:
        def __init__(self, num_bytes: int):
            self.num_bytes = num_bytes
            made.append(self)

        def nbytes(self) -> int:
            return self.num_bytes

        def copy_(self, source: StandIn, non_blocking: bool) -> None:
            assert non_blocking
            self.content = source.values.tolist()

    monkeypatch.setattr(module, "_pinned", Target)
    buffers, state = HostBuffers(), [StandIn([0, 0]), StandIn([0, 0]), StandIn([0] * 5)]
    # torch makes 8 of the 5 bytes: powers of two
    assert buffers.missing_bytes(state) == 2 + 2 + 8
    first, second = buffers.copy(StandIn([1, 2])), buffers.copy(StandIn([3, 4]))
    assert first is not second
    # in use: the next copies need more
    assert buffers.missing_bytes(state) == 2 + 2 + 8
    buffers.release()
    # the second checkpoint's copies go where the first's were
    assert buffers.missing_bytes(state) == 8
    assert {id(buffers.copy(StandIn([5, 6]))), id(buffers.copy(StandIn([7, 8])))} == {id(first), id(second)}
    assert buffers.copy(StandIn([9])) is made[2]
    assert len(made) == 3
