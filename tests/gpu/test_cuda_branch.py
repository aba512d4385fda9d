"""The whole step by the CUDA branch of attention against the other one: three heads, gradient cache,
checkpointing, ZeRO-3, two ranks."""

import pytest
import torch

from tests.engine.test_engine import make_engine, train_steps
from tests.factory import make_tiny_model_folder
from tests.gpu import varlen_stand_in
from tests.ranks import run_ranks

CHUNK_TOKENS = 40


def _both_ways(folder: str) -> dict:
    runs = train_steps(make_engine(folder, 3, offload=True), CHUNK_TOKENS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in = varlen_stand_in.install(monkeypatch, any_dtype=True)
        varlen = train_steps(make_engine(folder, 3, offload=True), CHUNK_TOKENS)
    return {"runs": runs, "varlen": varlen, "launches": stand_in.launches}


@pytest.mark.ranks
def test_a_step_by_the_varlen_way_equals_one_by_runs(tmp_path):
    # heads 16 wide: the kernel wants a multiple of 8
    folder = make_tiny_model_folder(tmp_path / "model")
    for result in run_ranks(_both_ways, 2, str(folder)):
        torch.testing.assert_close(result["varlen"]["losses"], result["runs"]["losses"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["varlen"]["norms"], result["runs"]["norms"], rtol=1e-4, atol=1e-5)
        assert result["varlen"]["marked"] == result["runs"]["marked"]
        # a forward pass without a graph, one with, and its recomputation: marked inputs are layers × chunks
        assert result["launches"] == 3 * sum(result["varlen"]["marked"])
