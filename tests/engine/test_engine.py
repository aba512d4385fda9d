"""DeepSpeed's engine under every ZeRO stage against a plain torch loop over the whole batch."""

from pathlib import Path
from unittest import mock

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from megam3.batch import Progress
from megam3.config.deepspeed import FP32_SUMS_FROM_STAGE, build_deepspeed_config
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import ModelConfig, OptimConfig
from megam3.dist import comm
from megam3.engine.activations import ActivationMemory
from megam3.engine.consolidate import consolidate
from megam3.engine.deepspeed import Engine, join, model_construction
from megam3.engine.schedule import learning_rate_factor
from megam3.errors import ConfigError
from megam3.model.m3 import is_head_parameter, represent
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective
from tests.batches import batch_of, make_groups, split_over_ranks
from tests.factory import make_tiny_model_folder
from tests.ranks import run_ranks
from tests.recipes import make_config

STEPS = 3
OPTIM = OptimConfig(lr=1e-3, head_lr=2e-3, weight_decay=0.01, warmup_ratio=0.4, clip_norm=0.5)
OBJECTIVE = UnifiedConfig(temperature=0.2, self_distill_start_step=1)
CPU = torch.device("cpu")


def ds_config(stage: int, *, bf16: bool = False) -> dict:
    return {
        "train_batch_size": comm.world_size(),
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": OPTIM.clip_norm,
        "bf16": {"enabled": bf16},
        **({"data_types": {"grad_accum_dtype": "fp32"}} if bf16 and stage >= FP32_SUMS_FROM_STAGE else {}),
    }


def make_engine(
    folder: str,
    stage: int,
    *,
    offload: bool = False,
    bf16: bool = False,
    total_steps: int = STEPS + 1,
    reduces_once: bool = False,
    zero: dict | None = None,
    final: dict | None = None,
) -> Engine:
    join(CPU)
    config = ds_config(stage, bf16=bf16) if final is None else final
    config["zero_optimization"] |= zero or {}
    with model_construction(config):
        module = load_m3(folder, ModelConfig(path=folder), dtype=torch.bfloat16 if bf16 else torch.float32)
    return Engine(
        module,
        optim=OPTIM,
        is_head_parameter=is_head_parameter,
        ds_config=config,
        device=CPU,
        total_steps=total_steps,
        activations=ActivationMemory(module, offload, offload),
        reduces_once=reduces_once,
    )


def train_steps(
    engine: Engine, chunk_tokens: int | None, first: int = 0, count: int = STEPS, accumulation: int = 1
) -> dict:
    objective = UnifiedObjective(OBJECTIVE, chunk_tokens)
    losses, norms, marked = [], [], []
    for step in range(first, first + count):
        torch.manual_seed(step)
        with engine.step_scope():
            total = 0.0
            for index in range(accumulation):
                batch = split_over_ranks(
                    make_groups(4, seed=step * accumulation + index), comm.rank(), comm.world_size()
                )
                with engine.accumulation(index, accumulation):
                    figures = objective.run(engine, batch, Progress(step=step))
                total += float(comm.all_reduce_sum(figures["loss/total"])) / comm.world_size() / accumulation
            marked.append(engine.activations.marked_inputs_saved)
        losses.append(total)
        norms.append(engine.update(step).grad_norm)
    return {"losses": losses, "norms": norms, "marked": marked}


def torch_reference(
    folder: str, accumulation: int = 1
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and final weights of `torch_run`."""
    losses, norms, model, _ = torch_run(folder, STEPS, accumulation)
    return losses, norms, model.state_dict()


def torch_run(folder: str, steps: int, accumulation: int = 1, total_steps: int = STEPS + 1) -> tuple:
    """One process, no DeepSpeed, no engine code: torch's AdamW and clipping over the global batch."""
    model = load_m3(folder, ModelConfig(path=folder)).train()
    groups = [
        {
            "params": [p],
            "peak": 2e-3 if is_head_parameter(n) else 1e-3,
            "weight_decay": 0.01 if p.dim() > 1 else 0.0,
        }
        for n, p in model.named_parameters()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    objective, losses, norms = UnifiedObjective(OBJECTIVE), [], []

    class Plain:
        def forward(self, *args):
            return model(*args)

        def backward(self, loss, is_last):
            (loss / accumulation).backward()

    for step in range(steps):
        optimizer.zero_grad()
        batches = [
            batch_of(make_groups(4, seed=step * accumulation + index)) for index in range(accumulation)
        ]
        figures = [objective.run(Plain(), batch, Progress(step=step)) for batch in batches]
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)))
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(
                step, total_steps, OPTIM.warmup_ratio, "linear"
            )
        optimizer.step()
        losses.append(sum(float(f["loss/total"]) for f in figures) / accumulation)
    return losses, norms, model, optimizer


# ZeRO stage, checkpointing with offload, chunk_tokens of the gradient cache
CASES = [
    (0, False, None),
    (0, True, 40),
    (1, False, 40),
    (2, False, None),
    (2, True, 40),
    (3, True, None),
    (3, False, 40),
    (3, True, 40),
]


def _all_stages(folder: str, out: str) -> list[dict]:
    results = []
    for stage, offload, chunk_tokens in CASES:
        engine = make_engine(folder, stage, offload=offload)
        result = train_steps(engine, chunk_tokens)
        target = f"{out}/{stage}-{offload}-{chunk_tokens}"
        engine.save(target)
        comm.barrier()
        resumed = make_engine(folder, stage, offload=offload)
        resumed.load(target)
        more, again = (
            train_steps(engine, chunk_tokens, STEPS, 1),
            train_steps(resumed, chunk_tokens, STEPS, 1),
        )
        results.append({**result, "folder": target, "next": more["losses"], "resumed_next": again["losses"]})
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def every_stage(folder, tmp_path_factory) -> list[list[dict]]:
    return run_ranks(_all_stages, 2, folder, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.mark.ranks
def test_two_ranks_under_every_stage_equal_torch_on_one(folder, every_stage):
    losses, norms, weights = torch_reference(folder)
    for result in every_stage[0]:
        torch.testing.assert_close(result["losses"], losses, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(result["norms"], norms, rtol=2e-4, atol=1e-5)
        merged = consolidate(result["folder"])
        assert merged.keys() == weights.keys()
        for name, tensor in weights.items():
            # a softmax does not see the key bias: its gradient is rounding noise, which Adam scales up to
            # full steps
            if name.endswith("key.bias"):
                continue
            where = f"{result['folder']} {name}"
            torch.testing.assert_close(
                merged[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, w=where: f"{w}: {m}"
            )
        assert result["resumed_next"] == result["next"], (
            "the step after a resume must be the very step that would have come"
        )


@pytest.mark.ranks
def test_offload_sees_the_input_of_every_checkpointed_layer_at_every_stage(every_stage):
    for (_, offload, chunk_tokens), result in zip(CASES, every_stage[1]):
        if not offload:
            assert result["marked"] == [0] * STEPS
        elif chunk_tokens is None:
            assert result["marked"] == [2] * STEPS, "two layers, one forward pass with a graph"
        else:
            assert all(count % 2 == 0 and count >= 4 for count in result["marked"]), (
                "two layers in each chunk's second pass"
            )


def _one_rank(folder: str, stage: int, accumulation: int) -> dict:
    return train_steps(make_engine(folder, stage), None, accumulation=accumulation)


@pytest.mark.ranks
def test_accumulated_batches_average_their_gradients(folder):
    losses, norms, _ = torch_reference(folder, accumulation=2)
    (result,) = run_ranks(_one_rank, 1, folder, 2, 2)
    torch.testing.assert_close(result["losses"], losses, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(result["norms"], norms, rtol=2e-4, atol=1e-5)


def _poisoned_steps(folder: str) -> list:
    seen = []
    for stage, bf16 in [(0, False), (1, False), (1, True), (3, False)]:
        engine = make_engine(folder, stage, bf16=bf16)
        train_steps(engine, None, 0, 1)
        before = _weights(engine)
        texts = batch_of(make_groups(2)).texts
        with engine.step_scope():
            engine.backward(represent(engine.forward, texts).dense_ND.sum() * float("nan"), True)
        poisoned = engine.update(1)
        with engine.step_scope():
            engine.backward(
                represent(engine.forward, texts).dense_ND.square().sum()
                + represent(engine.forward, texts).multi_KC.sum(),
                True,
            )
        dropped = engine.update(1, drop=True)
        same = all(torch.equal(a, b) for a, b in zip(before, _weights(engine)))
        next_loss = train_steps(engine, None, 1, 1)["losses"][0]
        moved = not all(torch.equal(a, b) for a, b in zip(before, _weights(engine)))
        seen.append([poisoned.skipped, dropped.skipped, same, moved, next_loss == next_loss])
    return seen


def _weights(engine: Engine) -> list[torch.Tensor]:
    """This rank's own weights (its partition under ZeRO-3)."""
    return [getattr(p, "ds_tensor", p).detach().clone() for p in engine.module.parameters()]


@pytest.mark.ranks
def test_a_nonfinite_or_dropped_gradient_leaves_every_weight_untouched(folder):
    for seen in run_ranks(_poisoned_steps, 2, folder):
        assert seen == [[True, True, True, True, True]] * 4


def _norms_of_one_and_of_many_passes(folder: str, stage: int) -> list[float]:
    engine, texts = make_engine(folder, stage, bf16=True), batch_of(make_groups(2)).texts
    norms = []
    for passes in (1, 400):
        with engine.step_scope():
            for index in range(passes):
                engine.backward(
                    represent(engine.forward, texts).dense_ND.float()[:, 0].sum() / passes,
                    index == passes - 1,
                )
        norms.append(engine.update(0, drop=True).grad_norm)
    return norms


@pytest.mark.ranks
def test_many_small_gradients_add_up_under_bf16(folder):
    """In bf16 a sum of equal terms stops growing at the 256th."""
    for stage in (2, 3):
        for one, many in run_ranks(_norms_of_one_and_of_many_passes, 2, folder, stage):
            assert many == pytest.approx(one, rel=0.01)


def _waits_of_deepspeed(folder: str) -> dict[str, list[int]]:
    """How often DeepSpeed waits for the whole device in each of five steps in chunks, by template."""
    waits: dict[str, list[int]] = {}
    for template in ("zero0", "zero1", "zero2", "zero3"):
        config = build_deepspeed_config(make_config(engine__template=template), 1)
        engine = make_engine(folder, config["zero_optimization"]["stage"], final=config)
        waits[template] = []
        for step in range(5):
            with mock.patch.object(get_accelerator(), "synchronize") as synchronize:
                train_steps(engine, 40, step, 1)
            waits[template].append(synchronize.call_count)
    return waits


@pytest.mark.ranks
def test_deepspeed_does_not_wait_for_the_device_in_a_chunk(folder):
    (waits,) = run_ranks(_waits_of_deepspeed, 1, folder)
    assert waits == dict.fromkeys(waits, [0] * 5)


def test_checkpointing_an_encoder_without_layers_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"engine.activation_checkpointing = True: Linear has no layers.*activation_checkpointing=false",
    ):
        ActivationMemory(torch.nn.Linear(2, 2), True, False)


def test_loading_a_pickle_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "engine").mkdir()
    torch.save({"module": Evil()}, tmp_path / "engine" / "mp_rank_00_model_states.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        consolidate(str(tmp_path))
    assert not (tmp_path / "ran").exists()
