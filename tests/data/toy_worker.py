"""A worker that answers with small batches, or misbehaves as it is told. Without torch: it starts in a
moment."""

import os

import numpy as np

from megam3.data.assemble import BatchArrays
from megam3.data.process import Handler
from megam3.errors import DataError


def make_handler(setup: dict) -> Handler:
    if setup.get("fail") == "setup":
        raise DataError("store", setup, "is broken", "mend it")

    def handle(number: int) -> BatchArrays:
        if number == setup.get("at"):
            if setup["fail"] == "user":
                raise DataError("row", number, "is broken", "mend it")
            if setup["fail"] == "bug":
                raise ZeroDivisionError(f"at {number}")
            if setup["fail"] == "exit":
                os._exit(7)
            if setup["fail"] == "print":
                print("a stray line")
        return BatchArrays(
            is_text=False,
            tokens=np.arange(5, dtype=np.int32) + number,
            lengths=np.array([2, 3]),
            group_offsets=np.array([0, 1]),
            rows=np.array([number]),
            hashes=np.array([number * 7]),
            query_hashes=np.zeros(1, np.int64),
            known_positives=np.zeros((1, 0), np.int64),
            positive_counts=np.zeros(0, np.int64),
            scores=np.zeros(0, np.float32),
            dataset="d",
            language="de",
            in_batch_negatives=True,
            num_truncated=0,
        )

    return handle
