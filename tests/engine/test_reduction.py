"""One reduction of gradients a step: the same training, one set of collective calls, fp32 sums under bf16."""

import pytest
import torch

from megam3.batch import Progress
from megam3.dist import comm
from megam3.engine.activations import ActivationMemory
from megam3.engine.consolidate import consolidate
from megam3.engine.deepspeed import Engine, join
from megam3.model.m3 import represent
from megam3.objectives.unified import UnifiedObjective
from tests.batches import batch_of, make_groups, split_over_ranks
from tests.engine.test_engine import (
    CPU,
    OBJECTIVE,
    OPTIM,
    STEPS,
    ds_config,
    make_engine,
    torch_reference,
    train_steps,
)
from tests.factory import make_tiny_model_folder
from tests.gpu import collective_counts
from tests.gpu.test_collectives import ENGINE_REDUCTIONS, step_of
from tests.ranks import run_ranks

CHUNK_TOKENS = 40
# as the templates have it: overlap and contiguous buffers take other paths through DeepSpeed
TEMPLATE = {"overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 20_000}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny"))


def _train(folder: str, out: str) -> list[dict]:
    results = []
    for stage in (2, 3):
        engine = make_engine(folder, stage, reduces_once=True, zero=TEMPLATE)
        result = train_steps(engine, CHUNK_TOKENS, accumulation=2)
        engine.save(f"{out}/{stage}")
        comm.barrier()
        # a checkpoint of either way continues under the other
        resumed = make_engine(folder, stage, zero=TEMPLATE)
        resumed.load(f"{out}/{stage}")
        again = [train_steps(each, CHUNK_TOKENS, STEPS, 1)["losses"][0] for each in (engine, resumed)]
        results.append({**result, "folder": f"{out}/{stage}", "next": again})
    return results


@pytest.mark.ranks
def test_two_ranks_that_reduce_once_equal_torch_on_one(folder, tmp_path):
    losses, norms, weights = torch_reference(folder, accumulation=2)
    for result in run_ranks(_train, 2, folder, str(tmp_path))[0]:
        torch.testing.assert_close(result["losses"], losses, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(result["norms"], norms, rtol=2e-4, atol=1e-5)
        assert result["next"][0] == pytest.approx(result["next"][1], rel=1e-6)
        merged = consolidate(result["folder"])
        for name, tensor in weights.items():
            # a softmax does not see the key bias: its gradient is rounding noise, which Adam scales up
            if not name.endswith("key.bias"):
                torch.testing.assert_close(merged[name], tensor, rtol=1e-3, atol=2e-5)


def _count(folder: str) -> dict:
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        counts = collective_counts.install(monkeypatch)
        for stage in (2, 3):
            engine = make_engine(folder, stage, reduces_once=True)
            step_of(engine, None, 0)
            counts.clear()
            chunks = step_of(engine, 60, 1)
            found[stage] = {"chunks": chunks, "calls": dict(counts)}
    return found


@pytest.mark.ranks
def test_gradients_of_all_chunks_are_reduced_once(folder):
    first, second = run_ranks(_count, 2, folder)
    assert first == second
    for stage, result in first.items():
        assert result["chunks"] > 1
        assert 0 < result["calls"].get("engine:all_reduce", 0) <= ENGINE_REDUCTIONS[int(stage)]
        scattered = result["calls"].get("engine:reduce_scatter_tensor", 0)
        assert scattered == (1 if int(stage) == 3 else 0)


def _norms(folder: str) -> list[float]:
    """Of one pass, and of 400 that add up to the same gradient."""
    engine = make_engine(folder, 2, bf16=True, reduces_once=True, zero=TEMPLATE)
    texts, norms = batch_of(make_groups(2)).texts, []
    for passes in (1, 400):
        with engine.step_scope():
            for index in range(passes):
                loss = represent(engine.forward, texts).dense_ND.float()[:, 0].sum() / passes
                engine.backward(loss, index == passes - 1)
        norms.append(engine.update(0, drop=True).grad_norm)
    return norms


@pytest.mark.ranks
def test_many_small_gradients_add_up_in_fp32_under_bf16(folder):
    """Left on the parameters they would be summed in bf16, which stops growing at the 256th."""
    for one, many in run_ranks(_norms, 2, folder):
        assert many == pytest.approx(one, rel=0.01)


def _mean_of_large_and_small() -> dict[str, float]:
    """Gradient norms when rank 0 contributes 1 and rank 1 adds 1/512, by precision of what is sent."""
    norms = {}
    join(CPU)
    for dtype in ("bf16", "fp32"):
        for once in (False, True):
            config = {**ds_config(2, bf16=True), "communication_data_type": dtype}
            module = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
            engine = Engine(
                module,
                optim=OPTIM,
                is_head_parameter=lambda name: False,
                ds_config=config,
                device=CPU,
                total_steps=1,
                activations=ActivationMemory(module, False, False),
                reduces_once=once,
            )
            row = torch.full((1, 1), 1.0 if comm.rank() == 0 else 1 / 512, dtype=torch.bfloat16)
            with engine.step_scope():
                engine.backward(engine.forward(row).float().sum(), True)
            norms[f"{dtype} {once}"] = engine.update(0, drop=True).grad_norm
    return norms


@pytest.mark.ranks
def test_gradients_sent_in_fp32_keep_what_bf16_rounds_away():
    """1 + 1/512 is 1 in bf16, whose neighbour is 1 + 1/128."""
    for norms in run_ranks(_mean_of_large_and_small, 2):
        assert norms["bf16 False"] == norms["bf16 True"] == 0.5
        assert norms["fp32 False"] == norms["fp32 True"] == (1 + 1 / 512) / 2


def _fail(folder: str) -> list[str]:
    """One rank fails between two backward passes; the other is at the end of its step."""
    seen = []
    engine = make_engine(folder, 2, reduces_once=True)
    batch = split_over_ranks(make_groups(4), comm.rank(), comm.world_size())
    try:
        with engine.step_scope():
            UnifiedObjective(OBJECTIVE).run(engine, batch, Progress())
            # both fail, one of them alone would leave the other waiting: what is shown is that no rank
            # starts a collective call while it leaves
            counted = collective_counts.install(pytest.MonkeyPatch())
            raise ValueError("spoilt")
    except ValueError as error:
        seen.append(str(error))
    return [*seen, *counted]


@pytest.mark.ranks
def test_a_step_that_fails_reduces_nothing_and_keeps_its_message(folder):
    assert run_ranks(_fail, 2, folder) == [["spoilt"], ["spoilt"]]
