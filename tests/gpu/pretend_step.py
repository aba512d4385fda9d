"""One optimizer step on the pretended device, from pinned batches to the figures for the log."""

from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree

from megam3.batch import Batch, Progress
from megam3.dist import comm
from megam3.objectives.base import Objective
from megam3.packed_texts import pin_memory
from megam3.step import Wishes, run_step
from tests.gpu import varlen_stand_in
from tests.gpu.pretend_device import Pretend, PretendTensor, move


class PlainEngine:
    """Forward and backward passes without DeepSpeed."""

    def __init__(self, model):
        self.model, self.num_chunks = model, 0

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def backward(self, loss, is_last):
        self.num_chunks += 1
        loss.backward()

    def step_scope(self):
        return nullcontext()

    def accumulation(self, index, count):
        return nullcontext()


COLLECTIVES = ("all_reduce", "all_gather_into_tensor", "all_to_all_single")


def _talk_from_device(monkeypatch, device):
    """Collective calls read and write the pretended device, as NCCL's do; gloo carries the numbers."""
    monkeypatch.setattr(comm, "transfer_device", lambda: device)

    def from_device(function):
        def call(*args, **kwargs):
            flat = pytree.tree_leaves((args, kwargs))
            tensors = [x for x in flat if isinstance(x, torch.Tensor)]
            assert all(isinstance(x, PretendTensor) for x in tensors), "NCCL takes no tensor of the host"
            args, kwargs = pytree.tree_map_only(PretendTensor, lambda x: x.inner, (args, kwargs))
            return function(*args, **kwargs)

        return call

    for name in COLLECTIVES:
        monkeypatch.setattr(dist, name, from_device(getattr(dist, name)))


def _offsets_on_host(kernel):
    """The stand-ins read offsets on the host, which the kernel does not."""

    def call(query, key, value, cu_q, cu_k, *lengths, **options):
        return kernel(query, key, value, cu_q.inner, cu_k.inner, *lengths, **options)

    return call


def step_on_device(
    monkeypatch: pytest.MonkeyPatch,
    model: torch.nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    step: int = 0,
) -> dict:
    """Figures, gradients, passes, waits of the host and launches of the step after `step` done ones."""
    stand_in = varlen_stand_in.install(monkeypatch, any_dtype=True)
    monkeypatch.setattr("megam3.model.attention.varlen_attn", _offsets_on_host(stand_in))
    halves = _offsets_on_host(varlen_stand_in.attend_halves)
    monkeypatch.setattr("megam3.model.cross_attention.varlen_attn", halves)
    engine = PlainEngine(model)
    with Pretend() as device:
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: device.pin(tensor))
        move(engine.model)
        batches, engine.device = [pin_memory(batch) for batch in batches], device.device
        if comm.is_grouped():
            _talk_from_device(monkeypatch, device.device)
        device.syncs.clear()
        device.launches = 0
        run = SimpleNamespace(
            config=SimpleNamespace(train=SimpleNamespace(seed=0)), engine=engine, objective=objective
        )
        report = run_step(run, batches, Progress(step=step), Wishes())
    return {
        "loss": report.figures["loss/total"],
        "gradients": {n: p.grad.inner for n, p in engine.model.named_parameters()},
        "chunks": engine.num_chunks,
        "waits": [list(wait) for wait in device.syncs],
        "launches": device.launches,
        "attention_launches": stand_in.launches,
    }
