"""Compiled encoder layers against the same layers uncompiled, by torch's own varlen operators with bodies for
the CPU, and how often something is compiled over batches of many shapes. Most tests trace (aot_eager); the
slow ones run what Inductor writes for a CPU."""

import random
import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from megam3.batch import Progress
from megam3.config.schema import ModelConfig
from megam3.engine.compiled import MAX_GRAPHS, compile_layers
from megam3.errors import ConfigError
from megam3.model.backbone import build_backbone
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective
from tests.batches import batch_of, make_groups
from tests.engine.test_engine import OBJECTIVE, make_engine, train_steps
from tests.factory import make_tiny_model_folder, random_token_ids
from tests.gpu import varlen_operator
from tests.model.test_attention import packed_hidden, tiny
from tests.ranks import run_ranks

BACKEND = "aot_eager"
"""Traces forward and backward passes as Inductor's front does, and runs torch's own operators."""


def shapes(count: int) -> list[list[int]]:
    """Lengths of packed batches, no two alike: 1 to 12 texts of 2 to 60 tokens, within ModernBERT's window
    and beyond it."""
    # the first has 7 texts, 8 offsets: as many as the heads of the tiny models are wide
    rng = random.Random(0)
    drawn = [[rng.randint(2, 60) for _ in range(rng.randint(1, 12))] for _ in range(count - 3)]
    return [*drawn, [2], [3, 2, 2], [40] * 12]


def graphs() -> int:
    """Forms compiled since the counters were cleared."""
    return counters["stats"]["unique_graphs"]


@pytest.fixture
def fresh(monkeypatch):
    varlen_operator.install(monkeypatch)
    torch._dynamo.reset()
    counters.clear()


def gradients(encoder, token_ids) -> dict[str, torch.Tensor]:
    hidden_TD = packed_hidden(encoder, token_ids)
    weights = torch.randn(hidden_TD.shape, generator=torch.Generator().manual_seed(1))
    (hidden_TD * weights).sum().backward()
    found = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    encoder.zero_grad()
    return {"hidden": hidden_TD.detach(), **found}


def two_encoders(family: str) -> list[torch.nn.Module]:
    """Alike and with dropout: every pass draws what the uncompiled layers draw."""
    encoders = [build_backbone(tiny(family, dropout=0.1)).train() for _ in range(2)]
    for encoder in encoders:
        # the varlen kernel has no dropout of attention weights
        for name in ("attention_probs_dropout_prob", "attention_dropout"):
            if hasattr(encoder.config, name):
                setattr(encoder.config, name, 0.0)
        for layer in encoder.modules():
            for name in ("self", "attn"):
                if hasattr(getattr(layer, name, None), "dropout"):
                    getattr(layer, name).dropout = torch.nn.Dropout(0.0)
    encoders[1].load_state_dict(encoders[0].state_dict())
    return encoders


@pytest.mark.parametrize(("family", "kinds"), [("xlm-roberta", 1), ("modernbert", 2)])
def test_equal_outputs_and_gradients_and_one_compilation_for_all_shapes(fresh, family, kinds):
    plain, compiled = two_encoders(family)
    assert compile_layers(compiled, BACKEND) == 3
    after = []
    for number, lengths in enumerate(shapes(20)):
        token_ids = random_token_ids(lengths, seed=number)
        with torch.no_grad():
            torch.manual_seed(number)
            without_graph = packed_hidden(compiled, token_ids)
        torch.manual_seed(number)
        ours = gradients(compiled, token_ids)
        torch.manual_seed(number)
        theirs = gradients(plain, token_ids)
        assert torch.equal(without_graph, ours["hidden"])
        assert ours.keys() == theirs.keys()
        for name, expected in theirs.items():
            torch.testing.assert_close(
                ours[name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        after.append(graphs())
    # with a graph and without, for each kind of layer
    assert after == [2 * kinds] * len(after), "something was compiled for a shape"
    assert not counters["graph_break"]


def _steps(folder: str, checkpointing: bool, stages: list[int]) -> dict:
    """Losses and gradient norms of three steps in chunks at some ZeRO stages, plain and compiled."""
    results = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        varlen_operator.install(monkeypatch)
        for stage in stages:
            results[f"{stage} plain"] = train_steps(make_engine(folder, stage, offload=checkpointing), 40)
            engine = make_engine(folder, stage, offload=checkpointing)
            compile_layers(engine.module, BACKEND)
            torch._dynamo.reset()
            counters.clear()
            results[f"{stage} compiled"] = train_steps(engine, 40)
            results[f"{stage} graphs"] = graphs()
    return results


@pytest.mark.ranks
@pytest.mark.parametrize(("checkpointing", "stages"), [(False, [1]), (True, [0, 2])])
def test_steps_under_the_engine_equal_uncompiled_ones(tmp_path, checkpointing, stages):
    """Gradient cache, dropout, checkpointing with offload, two ranks."""
    folder = make_tiny_model_folder(tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"hidden_dropout_prob": 0.0', '"hidden_dropout_prob": 0.1')
    )
    for result in run_ranks(_steps, 2, str(folder), checkpointing, stages):
        for stage in stages:
            plain, compiled = result[f"{stage} plain"], result[f"{stage} compiled"]
            torch.testing.assert_close(compiled["losses"], plain["losses"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(compiled["norms"], plain["norms"], rtol=1e-4, atol=1e-5)
            assert compiled["marked"] == plain["marked"]
            assert any(compiled["marked"]) == checkpointing
            # one kind of layer, with a graph and without
            assert result[f"{stage} graphs"] == 2


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor compiles its code for a CPU with g++"
)


@pytest.fixture
def fresh_code(fresh, tmp_path, monkeypatch):
    """Nothing compiled by an earlier run of the tests."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Inductor sums in another order: equal but for fp32's rounding of each tensor's largest entries."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        difference = (ours[name] - expected).abs().max()
        assert difference <= 1e-5 * expected.abs().max().clamp(min=1e-3), (name, float(difference))


@needs_compiler
@pytest.mark.slow
def test_inductors_layers_take_the_steps_of_plain_ones(fresh_code, tmp_path):
    """Loss and gradients of unified steps in chunks, with dropout, over batches of three shapes."""
    folder = make_tiny_model_folder(tmp_path / "model")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        config.replace('"hidden_dropout_prob": 0.0', '"hidden_dropout_prob": 0.1')
    )

    def step(model: torch.nn.Module, num_queries: int) -> dict[str, torch.Tensor]:
        class Plain:
            forward = staticmethod(model.__call__)
            backward = staticmethod(lambda loss, is_last: loss.backward())

        torch.manual_seed(num_queries)
        batch = batch_of(make_groups(num_queries, seed=num_queries))
        figures = UnifiedObjective(OBJECTIVE, 40).run(Plain(), batch, Progress(step=3))
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return {"loss": figures["loss/total"], **found}

    plain, compiled = (load_m3(str(folder), ModelConfig(path=str(folder))).train() for _ in range(2))
    assert compile_layers(compiled, "inductor") == 2
    after = []
    for num_queries in (4, 2, 7):
        assert_near(step(compiled, num_queries), step(plain, num_queries))
        after.append((graphs(), counters["inductor"]["fxgraph_cache_miss"]))
    # without a graph forward, with one forward and backward
    assert after == [(2, 3)] * 3, "something was compiled for a shape"
    assert not counters["graph_break"]


@needs_compiler
@pytest.mark.slow
def test_inductors_rotary_layers_with_and_without_a_window(fresh_code):
    plain, compiled = two_encoders("modernbert")
    compile_layers(compiled, "inductor")
    after = []
    for number, lengths in enumerate([[7, 12, 3], [5] * 8, [30, 2, 60, 11]]):
        token_ids = random_token_ids(lengths, seed=number)
        results = []
        for encoder in (compiled, plain):
            torch.manual_seed(number)
            results.append(gradients(encoder, token_ids))
        assert_near(*results)
        after.append(graphs())
    assert after == [2] * 3, "something was compiled for a shape"


@needs_compiler
@pytest.mark.slow
def test_in_bf16_both_passes_of_the_gradient_cache_round_alike(fresh_code):
    plain, compiled = (encoder.bfloat16() for encoder in two_encoders("xlm-roberta"))
    compile_layers(compiled, "inductor")
    for number, lengths in enumerate([[7, 12, 3], [5] * 8]):
        token_ids = random_token_ids(lengths, seed=number)
        results = []
        for encoder in (compiled, plain):
            torch.manual_seed(number)
            with torch.no_grad():
                without_graph = packed_hidden(encoder, token_ids)
            torch.manual_seed(number)
            results.append(packed_hidden(encoder, token_ids).detach())
            assert torch.equal(without_graph, results[-1])
        ours, theirs = (result.float() for result in results)
        # not one rounding (2^-9 of each number) is left out; a sum in another order may round the other way
        assert (ours - theirs).norm() < 2**-9 * theirs.norm()


def test_with_adapters_and_in_evaluation_layers_are_compiled_too(fresh, tmp_path):
    pytest.importorskip("peft")
    folder = str(make_tiny_model_folder(tmp_path / "model"))
    config = ModelConfig(path=folder, lora={"rank": 2, "dropout": 0.0})
    torch.manual_seed(0)
    model = load_m3(folder, config).train()
    token_ids = random_token_ids([7, 12, 3])
    expected = gradients(model.encoder, token_ids)
    compile_layers(model, BACKEND)
    ours = gradients(model.encoder, token_ids)
    assert any("lora_A" in name for name in ours)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(packed_hidden(model.encoder.eval(), token_ids), expected["hidden"])
    assert 0 < graphs() < MAX_GRAPHS


def test_an_encoder_without_layers_is_refused():
    with pytest.raises(ConfigError, match="Linear has no layers that can be compiled one by one; set engine"):
        compile_layers(torch.nn.Linear(2, 2))
