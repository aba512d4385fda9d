"""Batches ahead of time: workers assemble, a reader thread makes tensors, the loop takes them in order.

    worker 0: batches 0 2 4 …  ╲
    worker 1: batches 1 3 5 …  ── reader thread ──▶ queue of `prefetch` batches ──▶ training loop

A batch is a function of its number, so starting at number s gives exactly the batches an uninterrupted run
would have had from s on.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from megam3.batch import Batch, RetrievalBatch, TextBatch
from megam3.data.assemble import BatchArrays
from megam3.data.process import MakeHandler, Worker
from megam3.packed_texts import make_pairs, pack_stream, pin_memory

POLL_SECONDS = 0.2
"""How soon the reader notices that nobody wants its batches any more."""


def to_batch(arrays: BatchArrays, pin: bool = False) -> RetrievalBatch | TextBatch:
    """The batch as tensors; `pin`: in page-locked memory, so that its copies overlap with compute."""
    batch = _tensors(arrays)
    return pin_memory(batch) if pin else batch


def _tensors(arrays: BatchArrays) -> RetrievalBatch | TextBatch:
    texts = pack_stream(torch.from_numpy(arrays.tokens).long(), arrays.lengths.tolist())
    if arrays.pairs is not None:
        texts = replace(texts, lexical=make_pairs(arrays.pairs))
    offsets, rows = torch.from_numpy(arrays.group_offsets), torch.from_numpy(arrays.rows)
    if arrays.is_text:
        return TextBatch(
            texts=texts,
            document_offsets_N1=offsets,
            rows=rows,
            dataset=arrays.dataset,
            language=arrays.language,
            num_truncated=arrays.num_truncated,
        )
    known = arrays.known_positives
    return RetrievalBatch(
        texts=texts,
        group_offsets_Q1=offsets,
        rows_Q=rows,
        passage_hashes_P=torch.from_numpy(arrays.hashes),
        known_positive_hashes_QM=torch.from_numpy(known) if known.size else None,
        query_hashes_Q=torch.from_numpy(arrays.query_hashes),
        teacher_scores_P=torch.from_numpy(arrays.scores) if len(arrays.scores) else None,
        in_batch_negatives=arrays.in_batch_negatives,
        dataset=arrays.dataset,
        language=arrays.language,
        num_truncated=arrays.num_truncated,
        group_sizes=tuple(arrays.group_sizes),
        positive_counts=tuple(arrays.positive_counts.tolist()),
    )


class Loader:
    """Iterates over the batches with the given numbers.

    Args:
        make_handler: makes the handler that answers a batch number with BatchArrays; see process.Worker.
        setup: its argument.
        numbers: batches to serve, in order.
        num_workers: background processes.
        prefetch: batches held ready.
        pin: put them into page-locked memory.
    """

    def __init__(
        self,
        make_handler: MakeHandler,
        setup: Any,
        numbers: Sequence[int],
        num_workers: int,
        prefetch: int,
        pin: bool,
    ):
        self._make_handler, self._setup, self._numbers, self._pin = make_handler, setup, numbers, pin
        self._workers = [Worker(make_handler, setup) for _ in range(min(num_workers, len(numbers)))]
        self._window = max(prefetch, len(self._workers))
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=prefetch)
        self._stopped = threading.Event()
        self._reader = threading.Thread(target=self._read, name="megam3-loader", daemon=True)
        if self._workers:
            self._reader.start()

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in self._workers]

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches; whatever a worker raised, or its death, is raised here.

        Raises:
            UserError, WorkerError: from a worker.
        """
        if not self._workers:
            handler = self._make_handler(self._setup)
            for number in self._numbers:
                yield to_batch(handler(number), self._pin)
            return
        while (item := self._ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """End workers and reader; the loader gives no more batches."""
        self._stopped.set()
        for worker in self._workers:
            worker.kill()
        if self._reader.ident is not None:
            self._reader.join()
        for worker in self._workers:
            worker.close()

    def _read(self) -> None:
        sent = 0
        try:
            for done, _ in enumerate(self._numbers):
                while sent < min(len(self._numbers), done + self._window):
                    self._workers[sent % len(self._workers)].send(self._numbers[sent])
                    sent += 1
                arrays = self._workers[done % len(self._workers)].receive()
                if not self._put(to_batch(arrays, self._pin)):
                    return
            self._put(None)
        except BaseException as error:  # whatever it is, it belongs to the training thread
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._stopped.is_set():
            try:
                self._ready.put(item, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False
