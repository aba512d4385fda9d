"""Checkpoints continue at another world size and ZeRO stage: against an uninterrupted torch loop, and by
name, bit for bit."""

import shutil
import socket
from pathlib import Path

import pytest
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

import megam3.engine.consolidate as consolidate_module
import megam3.engine.deepspeed as deepspeed_module
from megam3.dist import comm
from megam3.engine.consolidate import MOMENTS, TAG, WEIGHT, SavedStates, consolidate, weights_only_loads
from megam3.errors import CheckpointError
from tests.engine.test_engine import make_engine, torch_run, train_steps
from tests.factory import make_tiny_model_folder
from tests.ranks import run_ranks

STEPS = 5
KINDS = (WEIGHT, *MOMENTS)


def _legs(model: str, root: str, legs: list) -> list[dict]:
    """Each leg continues from the folder of the one before it: one step, and what was read back right after
    loading."""
    results = []
    for source, target, stage, bf16, step in legs:
        engine = make_engine(model, stage, bf16=bf16, total_steps=STEPS)
        differences = []
        if source:
            engine.load_elastic(f"{root}/{source}")
            engine.save(f"{root}/{target}-reread")
            comm.barrier()
            before, after = SavedStates(f"{root}/{source}"), SavedStates(f"{root}/{target}-reread")
            differences = [
                f"{k} {n}"
                for k in KINDS
                for n in before.names
                if not torch.equal(before.read(n, k), after.read(n, k))
            ]
            differences += (
                []
                if before.adam_steps == after.adam_steps == step
                else [f"{before.adam_steps} {after.adam_steps} steps"]
            )
        outcome = train_steps(engine, None, step, 1)
        engine.save(f"{root}/{target}")
        comm.barrier()
        results.append(
            {"loss": outcome["losses"][0], "norm": outcome["norms"][0], "differences": differences}
        )
    return results


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    # 33 wide: nothing divides by two ranks, so every padding there is shows
    return str(make_tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny", hidden_size=33, num_heads=3))


@pytest.fixture(scope="module")
def chain(model, tmp_path_factory) -> tuple[str, list[dict]]:
    """2 ranks ZeRO 1 → 1 rank ZeRO 1 → 2 ranks ZeRO 1 → ZeRO 3 → ZeRO 0; and in bf16, from the first, ZeRO 1
    → 3 → 0 → 2."""
    root = str(tmp_path_factory.mktemp("chain"))
    results = run_ranks(_legs, 2, model, root, [(None, "a", 1, False, 0)])[0]
    results += run_ranks(_legs, 1, model, root, [("a", "b", 1, False, 1)])[0]
    last = [("b", "c", 1, False, 2), ("c", "d", 3, False, 3), ("d", "e", 0, False, 4)]
    bf16 = [("a", "f", 1, True, 1), ("f", "g", 3, True, 2), ("g", "h", 0, True, 3), ("h", "i", 2, True, 4)]
    results += run_ranks(_legs, 2, model, root, last + bf16)[0]
    return root, results


@pytest.mark.ranks
def test_a_run_that_changes_ranks_and_stages_equals_the_uninterrupted_one(model, chain):
    root, results = chain
    losses, norms, reference, optimizer = torch_run(model, STEPS, total_steps=STEPS)
    results = results[:STEPS]
    torch.testing.assert_close([r["loss"] for r in results], losses, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close([r["norm"] for r in results], norms, rtol=2e-4, atol=1e-5)
    saved = SavedStates(f"{root}/e")
    assert saved.adam_steps == STEPS
    assert set(saved.names) == {name for name, _ in reference.named_parameters()}
    for name, parameter in reference.named_parameters():
        if name.endswith("key.bias"):
            continue  # a softmax does not see it: its gradient is rounding noise
        state = optimizer.state[parameter]
        for kind, wanted in [(WEIGHT, parameter.detach()), *((k, state[k]) for k in MOMENTS)]:
            scale = float(wanted.abs().max())
            torch.testing.assert_close(
                saved.read(name, kind),
                wanted,
                rtol=1e-3,
                atol=1e-4 * scale,
                msg=lambda m, n=f"{kind} {name}": f"{n}: {m}",
            )


@pytest.mark.ranks
def test_weights_moments_and_step_count_survive_every_change_bit_for_bit(chain):
    assert [r["differences"] for r in chain[1]] == [[]] * (STEPS + 4)


@pytest.mark.ranks
def test_bf16_carries_fp32_masters_and_not_the_rounded_weights(chain):
    for leg in "ghi":
        saved = SavedStates(f"{chain[0]}/{leg}-reread")
        assert any(not torch.equal(saved.read(n), saved.read(n).bfloat16().float()) for n in saved.names), leg


@pytest.mark.ranks
def test_joined_weights_equal_deepspeeds_own_conversion(chain):
    for leg in "abcd":
        with weights_only_loads():
            wanted = get_fp32_state_dict_from_zero_checkpoint(f"{chain[0]}/{leg}", tag=TAG)
        merged = consolidate(f"{chain[0]}/{leg}")
        assert merged.keys() == wanted.keys()
        assert all(torch.equal(merged[name], wanted[name]) for name in wanted)


def _before_the_first_step(model: str, root: str) -> list[bool]:
    held = []
    for stage in (1, 3, 0):
        make_engine(model, stage).save(f"{root}/{stage}")
        engine = make_engine(model, 2)
        engine.load_elastic(f"{root}/{stage}")
        loss = train_steps(engine, None, 0, 1)["losses"]
        saved = SavedStates(f"{root}/{stage}")
        held.append(
            saved.moments == ()
            and saved.adam_steps == 0
            and loss == train_steps(make_engine(model, 2), None, 0, 1)["losses"]
        )
    return held


@pytest.mark.ranks
def test_a_checkpoint_from_before_the_first_update_carries_no_moments_and_continues(model, tmp_path):
    assert run_ranks(_before_the_first_step, 1, model, str(tmp_path)) == [[True, True, True]]


def _load_elsewhere(model: str, root: str) -> list:
    """Rank 1 sees the folder without one of its files, as on a node with another disk; then the whole folder,
    listed by rank 0 alone."""
    engine = make_engine(model, 1, total_steps=STEPS)
    engine.save(f"{root}/0")
    comm.barrier()
    listed = []
    plain = consolidate_module.list_files
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(deepspeed_module, "list_files", lambda f: listed.append(f) or plain(f))
        engine.load_elastic(f"{root}/0")
        message = ""
        if comm.rank() == 1:
            shutil.copytree(f"{root}/0", f"{root}/1")
            next(Path(f"{root}/1").rglob("*rank_1_*_optim_states.pt")).unlink()
        try:
            # each rank its own disk under the same name
            engine.load_elastic(f"{root}/{comm.rank()}")
        except CheckpointError as error:
            message = str(error)
    return [len(listed), message]


@pytest.mark.ranks
def test_rank_0_lists_the_files_and_a_rank_that_misses_one_says_so(model, tmp_path):
    (first, said_0), (second, said_1) = run_ranks(_load_elsewhere, 2, model, str(tmp_path))
    assert (first, second) == (2, 0)
    assert said_0 == ""
    assert f"rank 1 on {socket.gethostname()} does not see {tmp_path}/1/{TAG}/" in said_1
    assert "which rank 0 lists; give output_dir on a file system that all nodes share" in said_1
