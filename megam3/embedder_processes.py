"""Encoding by several processes, each with the model on a device of its own.

M3Embedder(folder).on_devices(["cuda:0", "cuda:1"])
    encoding_processes(folder, "bf16", ["cuda:0", "cuda:1"])
        EncodingProcesses.encode     token ids of all texts ──batch by batch──▶ the process that is free
        make_encoder                 in such a process: a batch ──▶ what is encoded of it, on the host
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from megam3.data.process import Worker, answers_of
from megam3.model.device import Precision
from megam3.model.encoded import Encoded, encoded_batch
from megam3.model.inference import load_model, offered_heads, represent_batches, suited_batch_tokens
from megam3.model.pretrained import refuse_missing_heads
from megam3.packed_texts import length_batches

Request = tuple[Sequence[str], list[np.ndarray]]
"""(heads, token ids of each text) of one batch."""


@dataclass(frozen=True, kw_only=True)
class EncodingProcesses:
    """Processes that hold the same model."""

    workers: Sequence[Worker]
    devices: Sequence[torch.device]
    """One for each of them."""

    def encode(
        self, token_ids: Sequence[np.ndarray], heads: Sequence[str], batch_tokens: int | None
    ) -> Iterator[tuple[list[int], Encoded]]:
        """(positions in `token_ids`, what is encoded of them) in the batches of one process.

        Args:
            batch_tokens: tokens encoded at a time; None: what suits the devices.
        """
        batch_tokens = suited_batch_tokens(self.devices) if batch_tokens is None else batch_tokens
        batches = list(length_batches([len(ids) for ids in token_ids], batch_tokens))
        requests = ((tuple(heads), [token_ids[i] for i in indices]) for indices in batches)
        for number, part in answers_of(self.workers, requests):
            yield batches[number], part


@dataclass(frozen=True, kw_only=True)
class ProcessSetup:
    """What a process gets."""

    path: str
    precision: Precision
    device: torch.device
    num_threads: int
    """Where it computes on the host."""


@contextmanager
def encoding_processes(
    path: str, precision: Precision, devices: Sequence[torch.device]
) -> Iterator[EncodingProcesses]:
    """A process for each of `devices`, ended with the block; those on the host share its threads."""
    num_on_host = sum(device.type == "cpu" for device in devices)
    num_threads = max(1, torch.get_num_threads() // max(1, num_on_host))
    with ExitStack() as opened:
        workers = []
        for device in devices:
            setup = ProcessSetup(path=path, precision=precision, device=device, num_threads=num_threads)
            workers.append(Worker(make_encoder, setup))
            opened.callback(workers[-1].close)
        yield EncodingProcesses(workers=workers, devices=devices)


def make_encoder(setup: ProcessSetup) -> Callable[[Request], Encoded]:
    """Handler that encodes one batch of token ids (worker side)."""
    torch.set_num_threads(setup.num_threads)
    model = load_model(setup.path, setup.device, setup.precision)

    def encode(request: Request) -> Encoded:
        heads, token_ids = request
        # the folder may have changed since the parent read it
        refuse_missing_heads(offered_heads(model), heads, "heads")
        # they are one batch already, in its order
        total = sum(map(len, token_ids))
        ((_, batch),) = represent_batches(model, token_ids, max(1, total), heads)
        return encoded_batch(batch, heads)

    return encode
