"""A worker that answers with small batches, or misbehaves as it is told. Without torch: it starts in a moment."""

import os

import numpy as np

from megam3.data.process import Handler, run_worker
from megam3.errors import DataError


def make_handler(setup: dict) -> Handler:
    if setup.get("fail") == "setup":
        raise DataError("store", setup, "is broken", "mend it")

    def handle(request: dict):
        number = request["number"]
        if number == setup.get("at"):
            if setup["fail"] == "user":
                raise DataError("row", number, "is broken", "mend it")
            if setup["fail"] == "bug":
                raise ZeroDivisionError(f"at {number}")
            if setup["fail"] == "exit":
                os._exit(7)
            if setup["fail"] == "print":
                print("a stray line")
        lengths = np.array([2, 3])
        tokens = np.arange(5, dtype=np.int32) + number
        labels = {
            "kind": "pair",
            "dataset": "d",
            "language": "de",
            "num_truncated": 0,
            "in_batch_negatives": True,
        }
        arrays = [
            tokens,
            lengths,
            np.array([0, 1]),
            np.array([number]),
            np.array([number * 7]),
            np.zeros(0, np.float32),
        ]
        return labels, [np.asarray(array) for array in arrays]

    return handle


if __name__ == "__main__":
    run_worker(make_handler)
