"""How many collective calls a step of two ranks makes, by who makes them; docs/gpu.md lists them."""

from dataclasses import replace

import pytest

from megam3.batch import Progress
from megam3.dist import comm
from megam3.objectives.unified import UnifiedObjective
from tests.batches import make_groups, split_over_ranks
from tests.engine.test_engine import OBJECTIVE, make_engine
from tests.factory import make_tiny_model_folder
from tests.gpu import collective_counts
from tests.ranks import run_ranks

STAGES = (1, 2, 3)


def _count(folder: str) -> dict:
    """By "stage, chunk tokens": backward passes of the second step of an engine, and its collective calls."""
    results = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        # before DeepSpeed starts, which keeps some of the functions
        counts = collective_counts.install(monkeypatch)
        for stage in STAGES:
            engine = make_engine(folder, stage)
            step_of(engine, None, 0)
            for chunk_tokens in (None, 60):
                counts.clear()
                chunks = step_of(engine, chunk_tokens, 1)
                results[f"{stage}, {chunk_tokens}"] = {"chunks": chunks, "calls": dict(counts)}
    return results


def step_of(engine, chunk_tokens: int | None, step: int) -> int:
    """One step; returns its backward passes."""
    chunks, backward = [], engine.backward
    engine.backward = lambda loss, is_last: (chunks.append(is_last), backward(loss, is_last))
    batch = split_over_ranks(make_groups(4, seed=step), comm.rank(), comm.world_size())
    # as the loader gives them; no question is asked twice, so no known positives travel
    batch = replace(batch, query_hashes_Q=batch.rows_Q.clone())
    with engine.step_scope(), engine.accumulation(0, 1):
        UnifiedObjective(OBJECTIVE, chunk_tokens).run(engine, batch, Progress(step=step))
    engine.update(step)
    engine.backward = backward
    return len(chunks)


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    folder = make_tiny_model_folder(tmp_path_factory.mktemp("model"))
    first, second = run_ranks(_count, 2, str(folder))
    assert first == second
    return first


LOSS_GATHERS, LOSS_EXCHANGES = 7, 5
"""Of three heads, their sum and distillation over two ranks, backward pass included. May only fall."""
ENGINE_REDUCTIONS = {1: 5, 2: 5, 3: 4}
"""All-reduces of an engine with one backward pass: gradients (stages 1, 2), their norm, overflow."""
ENGINE_GATHERS = {1: 4, 2: 4, 3: 41}
"""All-gathers of weights: stages 1 and 2 after the update, stage 3 of this model parameter by parameter."""


def _sum(result: dict, operation: str, *, of_engine: bool | None = None) -> int:
    return sum(
        count
        for name, count in result["calls"].items()
        if name.endswith(f":{operation}") and of_engine in (None, name.startswith("engine:"))
    )


@pytest.mark.ranks
@pytest.mark.parametrize("chunk_tokens", [None, 60])
@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_communicates_once_a_step_however_many_chunks(counted, stage, chunk_tokens):
    result = counted[f"{stage}, {chunk_tokens}"]
    assert (result["chunks"] > 1) == (chunk_tokens is not None)
    assert 0 < _sum(result, "all_gather_into_tensor", of_engine=False) <= LOSS_GATHERS
    assert 0 < _sum(result, "all_to_all_single") <= LOSS_EXCHANGES
    # the number of chunks that all ranks run
    assert _sum(result, "all_reduce", of_engine=False) == (chunk_tokens is not None)


@pytest.mark.ranks
@pytest.mark.parametrize("chunk_tokens", [None, 60])
@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_reduced_as_often_as_the_volume_table_says(counted, stage, chunk_tokens):
    result = counted[f"{stage}, {chunk_tokens}"]
    chunks = result["chunks"]
    more = chunks - 1 if stage == 2 else 0
    assert _sum(result, "all_reduce", of_engine=True) <= ENGINE_REDUCTIONS[stage] + more
    assert 0 < _sum(result, "all_gather_into_tensor", of_engine=True) <= ENGINE_GATHERS[stage]
    assert _sum(result, "broadcast") <= (6 if stage == 3 else 0)
    assert _sum(result, "reduce_scatter_tensor") == (chunks if stage == 3 else 0)


@pytest.mark.ranks
def test_stage_2_reduces_after_every_chunk_and_stage_1_once(counted):
    for stage, more in ((1, 0), (2, counted["2, 60"]["chunks"] - 1)):
        one, many = (_sum(counted[f"{stage}, {c}"], "all_reduce", of_engine=True) for c in (None, 60))
        assert many == one + more
