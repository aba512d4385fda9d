"""Low-rank adapters: which parameters train, and that merging gives the model that was trained."""

import builtins

import peft
import pytest
import torch

from megam3.config.model_checks import adapters
from megam3.config.schema import LoraConfig, ModelConfig
from megam3.errors import CheckpointError, ConfigError
from megam3.export.verify import model_from_state
from megam3.model.lora import has_lora, merge_lora
from megam3.model.m3 import represent
from megam3.model.pretrained import load_m3
from megam3.packed_texts import pack_texts
from tests.factory import make_tiny_model_folder, random_token_ids
from tests.recipes import make_config

LORA = LoraConfig(rank=4, alpha=10.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_tiny_model_folder(tmp_path_factory.mktemp("lora") / "tiny"))


def load(folder: str, lora: LoraConfig | None = LORA, **options):
    return load_m3(folder, ModelConfig(path=folder, lora=lora), **options).eval()


def away_from_the_start(model):
    """As after training: B is no longer 0, and heads have moved."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def texts():
    return pack_texts(random_token_ids([5, 17, 3, 9]))


def floats(model) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return represent(model, texts()).floats()


def test_adapters_and_heads_train_and_nothing_else(folder):
    model = load(folder)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    heads = {name for name in trained if not name.startswith("encoder.")}
    assert heads == {
        f"{head}_head.{kind}" for head in ("lexical", "multi_vector") for kind in ("weight", "bias")
    }
    linear = sum(isinstance(m, torch.nn.Linear) for m in load(folder, None).encoder.modules())
    assert len(trained - heads) == 2 * linear
    assert all(".lora_A." in name or ".lora_B." in name for name in trained - heads)


def test_training_starts_at_the_model_itself(folder):
    for ours, theirs in zip(floats(load(folder)), floats(load(folder, None)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_named_modules_alone_are_adapted(folder):
    model = load(folder, LORA.model_copy(update={"target_modules": ["query", "value"]}))
    adapted = {
        n.split(".lora_A")[0].rpartition(".")[2] for n, _ in model.named_parameters() if ".lora_A." in n
    }
    assert adapted == {"query", "value"}


def test_merged_weights_represent_as_the_adapted_model_and_as_peft_merges(folder):
    model = away_from_the_start(load(folder))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert has_lora(state)
    merged = model_from_state(state, folder, ModelConfig(path=folder, lora=LORA))
    expected = floats(model)
    for ours, theirs in zip(floats(merged), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    # the adapters did something
    assert (floats(load(folder, None))[0] - expected[0]).abs().max() > 1e-2
    for module in model.encoder.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    by_peft = {name: t for name, t in model.state_dict().items() if ".base_layer." in name}
    ours = merge_lora(state, LORA)
    for name, tensor in by_peft.items():
        torch.testing.assert_close(ours[name.replace(".base_layer.", ".")], tensor, rtol=0, atol=1e-6)


def test_alpha_is_the_rank_where_nobody_gives_it(folder):
    state = away_from_the_start(load(folder)).state_dict()
    plain = merge_lora(state, LoraConfig(rank=4))
    scaled = merge_lora(state, LoraConfig(rank=4, alpha=4.0))
    assert all(torch.equal(plain[name], scaled[name]) for name in plain)
    assert not all(torch.equal(plain[n], t) for n, t in merge_lora(state, LORA).items())


def test_adapted_weights_without_their_settings_are_refused(folder):
    with pytest.raises(CheckpointError, match="nothing says what alpha"):
        model_from_state(load(folder).state_dict(), folder)


def test_modules_that_are_not_there_are_refused_with_those_that_are(folder):
    with pytest.raises(ConfigError, match=r"model.lora.target_modules.*qkv.*name linear layers.*query"):
        load(folder, LORA.model_copy(update={"target_modules": ["qkv"]}))


def test_without_peft_it_is_named(folder, monkeypatch):
    original = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"needs the package peft.*pip install 'megam3\[lora\]'"):
        load(folder)


@pytest.mark.parametrize(
    ("given", "installed", "message"),
    [
        ({}, False, "needs the package peft, which is not installed"),
        ({"model__freeze": ["encoder"]}, True, "leaves the adapters of model.lora frozen too"),
        ({"objective": {"kind": "pretrain"}}, True, "trains the whole encoder"),
        ({}, True, None),
        ({"model__freeze": ["embeddings"]}, True, None),
    ],
)
def test_recipes_that_contradict_adapters_are_refused(given, installed, message, monkeypatch):
    config = make_config(model__lora={"rank": 4}, **given)
    monkeypatch.setattr("megam3.config.model_checks.find_spec", lambda name: object() if installed else None)
    problems = " ".join(str(problem) for problem in adapters(config))
    assert message in problems if message else not problems


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ConfigError, match=r"model.lora.rank"):
        make_config(model__lora={"rank": 0})
