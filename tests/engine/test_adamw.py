"""The choice of an AdamW, and DeepSpeed's for host memory, built for real, against torch's."""

import logging
import os

import pytest
import torch

from megam3.config.deepspeed import build_deepspeed_config
from megam3.config.schema import OptimConfig
from megam3.engine.adamw import build_adamw, choose_adamw
from megam3.engine.deepspeed import Engine
from megam3.errors import ConfigError
from tests.compiled_operators import compile_adamw, needs_compiler
from tests.engine.test_engine import ds_config, make_engine, train_steps
from tests.factory import make_tiny_model_folder
from tests.ranks import run_ranks
from tests.recipes import make_config


@pytest.fixture
def built() -> str:
    return compile_adamw()


@pytest.mark.parametrize(("wish", "kind"), [("auto", "fused"), ("fused", "fused"), ("plain", "plain")])
def test_torchs_need_no_compiler_and_the_choice_is_logged(wish, kind, caplog):
    def load():
        raise AssertionError("nothing is built")

    with caplog.at_level(logging.INFO):
        assert choose_adamw(wish, load) == kind
    assert [record.getMessage() for record in caplog.records] == [
        {"fused": "AdamW: torch's, fused", "plain": "AdamW: torch's, an operator at a time"}[kind]
    ]
    optimizer = build_adamw([{"params": [torch.nn.Parameter(torch.ones(2))]}], OptimConfig(lr=1e-3), kind)
    assert bool(optimizer.defaults["fused"]) == (kind == "fused")


def test_where_it_cannot_be_built_the_message_says_why():
    def load():
        raise RuntimeError("Ninja is required to load C++ extensions\nand more")

    with pytest.raises(ConfigError) as caught:
        choose_adamw("deepspeed_cpu", load)
    assert str(caught.value) == (
        "engine.adamw = 'deepspeed_cpu': DeepSpeed's AdamW for host memory cannot be built here (Ninja is"
        " required to load C++ extensions); install g++ and ninja, or set engine.adamw=auto"
    )


def test_a_build_that_another_process_holds_is_named(tmp_path, monkeypatch, caplog):
    lock = tmp_path / "py311_cu130" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert choose_adamw("deepspeed_cpu", lambda: None) == "deepspeed_cpu"
    expected = (
        f"waiting for {lock}: another process compiles DeepSpeed's AdamW for host memory, or was killed while"
        " it did; delete the file if none does"
    )
    assert expected in caplog.messages
    caplog.clear()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(lock.parents[1]))
    choose_adamw("deepspeed_cpu", lambda: None)
    assert expected in caplog.messages
    lock.unlink()
    caplog.clear()
    choose_adamw("deepspeed_cpu", lambda: None)
    assert not any("waiting" in message for message in caplog.messages)


def test_states_on_the_device_are_not_for_it():
    def build(template):
        return build_deepspeed_config(
            make_config(engine__adamw="deepspeed_cpu", engine__template=template), 1
        )

    assert build("zero3_offload")
    with pytest.raises(ConfigError) as caught:
        build("zero2")
    assert "zero2 keeps the optimizer's states elsewhere; use a template with offload_optimizer" in str(
        caught.value
    )


def _both(steps: int, built: str) -> list:
    """Weights after so many steps of changing rates and gradients: DeepSpeed's, torch's fused, torch's
    plain."""
    os.environ["TORCH_EXTENSIONS_DIR"] = built
    assert choose_adamw("deepspeed_cpu") == "deepspeed_cpu"
    results = []
    for kind in ("deepspeed_cpu", "fused", "plain"):
        generator = torch.Generator().manual_seed(0)
        # 1003: the vector units' rest takes part
        weights = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in (1003, 7)]
        groups = [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "weight_decay": 0.0}]
        optimizer = build_adamw(groups, OptimConfig(lr=1e-3, betas=[0.9, 0.98], eps=1e-6), kind)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()
        results.append([weight.detach() for weight in weights])
    return results


@needs_compiler
@pytest.mark.slow
def test_deepspeeds_moves_weights_as_torchs_does(built):
    steps = 20
    (ours, fused, plain) = run_ranks(_both, 1, steps, built)[0]
    # a step rounds each weight twice (decay, update), by half of 2^-23 of its size at most, on either side
    for mine, theirs in ((ours, fused), (ours, plain)):
        for a, b in zip(mine, theirs):
            assert ((a - b).abs() <= 2 * steps * 2.0**-23 * b.abs().clamp(min=1.0)).all()
            assert not torch.equal(b, torch.zeros_like(b))


def _engine(folder: str, stage: int, kind: str) -> Engine:
    """As make_engine, with the optimizer's states in host memory."""

    def config(stage: int, *, bf16: bool = False) -> dict:
        # as the templates with offload say it: otherwise DeepSpeed takes no other AdamW than its own
        return {**ds_config(stage, bf16=bf16), "zero_force_ds_cpu_optimizer": False}

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("tests.engine.test_engine.ds_config", config)
        monkeypatch.setattr(
            "megam3.engine.deepspeed.build_adamw", lambda groups, optim, _: build_adamw(groups, optim, kind)
        )
        return make_engine(folder, stage, zero={"offload_optimizer": {"device": "cpu"}})


def _steps(folder: str, root: str, built: str) -> dict:
    """Losses of each implementation; and of the steps after a change of implementation, by either loader."""
    os.environ["TORCH_EXTENSIONS_DIR"] = built
    results = {}
    for stage in (2, 3):
        for kind, other in (("deepspeed_cpu", "fused"), ("fused", "deepspeed_cpu")):
            engine = _engine(folder, stage, kind)
            results[f"{stage} {kind}"] = train_steps(engine, None, 0, 2)["losses"]
            engine.save(f"{root}/{stage}-{kind}")
            results[f"{stage} {kind} on"] = train_steps(engine, None, 2, 2)["losses"]
            for loader in ("load", "load_elastic"):
                changed = _engine(folder, stage, other)
                getattr(changed, loader)(f"{root}/{stage}-{kind}")
                results[f"{stage} {kind} {loader}"] = train_steps(changed, None, 2, 2)["losses"]
    return results


@needs_compiler
@pytest.mark.ranks
@pytest.mark.slow
def test_a_run_may_change_its_adamw(tmp_path, built):
    folder = str(make_tiny_model_folder(tmp_path / "model"))
    (result,) = run_ranks(_steps, 1, folder, str(tmp_path), built)
    for stage in (2, 3):
        torch.testing.assert_close(
            result[f"{stage} deepspeed_cpu"], result[f"{stage} fused"], rtol=1e-5, atol=1e-6
        )
        for kind in ("deepspeed_cpu", "fused"):
            for loader in ("load", "load_elastic"):
                torch.testing.assert_close(
                    result[f"{stage} {kind} {loader}"], result[f"{stage} {kind} on"], rtol=1e-5, atol=1e-6
                )
