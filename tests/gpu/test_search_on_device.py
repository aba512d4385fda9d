"""Ranking again by multi-vectors where the model is: on a device of its own type."""

import numpy as np
import torch

from megam3.retrieval.index import search
from tests.gpu.pretend_device import Pretend, _register
from tests.ranks import run_ranks
from tests.retrieval.index.made_up import make_vectors


def _scores_on_device() -> list[bool]:
    _register()
    queries, passages = make_vectors(3, seed=2), make_vectors(9, seed=1)
    close = []
    for query in range(3):
        rows = queries.multi(query)
        expected = search.maxsim_of_passages(rows, passages, "cpu")
        with Pretend() as device, torch.no_grad():
            found = search.maxsim_of_passages(rows, passages, str(device.device))
        close.append(bool(np.allclose(found, expected, atol=1e-6)))
    return close


def test_multi_vector_scores_on_a_device_equal_those_on_the_host():
    assert run_ranks(_scores_on_device, 1) == [[True] * 3]
