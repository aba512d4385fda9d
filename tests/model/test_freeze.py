"""Which parameters a name of `model.freeze` takes out of training."""

from types import SimpleNamespace

import pytest

from megam3.config.freezing import freeze_problems
from megam3.config.model_checks import something_to_train
from megam3.config.schema import ModelConfig
from megam3.errors import ConfigError
from megam3.model.freeze import freeze_parameters
from megam3.model.pretrained import load_m3
from tests.factory import make_tiny_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(make_tiny_model_folder(tmp_path_factory.mktemp("freeze") / "tiny", num_layers=3))


def _frozen(folder: str, parts: list[str], **options) -> set[str]:
    model = load_m3(folder, ModelConfig(path=folder), **options)
    freeze_parameters(model, parts)
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    ("parts", "prefixes"),
    [
        ([], ()),
        (["encoder"], ("encoder.",)),
        (["embeddings"], ("encoder.embeddings.",)),
        (["positions"], ("encoder.embeddings.position_embeddings.",)),
        (["layers 0..1"], ("encoder.encoder.layer.0.", "encoder.encoder.layer.1.")),
        (["positions", "layers 2..2"], ("encoder.embeddings.position_", "encoder.encoder.layer.2.")),
    ],
)
def test_exactly_the_named_parts_are_frozen(folder, parts, prefixes):
    model = load_m3(folder, ModelConfig(path=folder))
    names = {name for name, _ in model.named_parameters()}
    expected = {name for name in names if prefixes and name.startswith(prefixes)}
    assert _frozen(folder, parts) == expected
    assert bool(expected) == bool(parts)


def test_what_is_not_there_or_leaves_nothing_is_refused(folder):
    with pytest.raises(ConfigError, match="the encoder has no such part"):
        _frozen(folder, ["layers 1..3"])
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        _frozen(folder, ["encoder"], heads=["dense"])
    assert _frozen(folder, ["encoder"], heads=["dense", "lexical"])


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("encodr", "must be one of encoder, embeddings, positions"),
        ("layers 3..1", r"write layers 1..3"),
        ("layers 0..12", r"the encoder has layers 0..11"),
        ("layers 0-3", "write for example: layers 0..5"),
    ],
)
def test_names_are_checked_without_a_model(part, message):
    (problem,) = freeze_problems(["positions", part], 12)
    assert "model.freeze.1" in str(problem)
    with pytest.raises(ConfigError, match=message):
        raise problem
    assert list(freeze_problems(["layers 0..11", "encoder"], 12)) == []


def test_a_stage_needs_something_to_train_and_rates_need_their_head():
    def found(freeze: list[str], heads: tuple[str, ...], **rates) -> list[str]:
        optim = SimpleNamespace(**{"lexical_lr": None, "multi_vector_lr": None, **rates})
        config = SimpleNamespace(
            model=SimpleNamespace(freeze=freeze),
            objective=SimpleNamespace(scored_heads=lambda: heads),
            optim=optim,
        )
        return [str(problem) for problem in something_to_train(config)]

    (message,) = found(["encoder"], ("dense",))
    assert message.startswith("model.freeze")
    (message,) = found([], ("dense", "lexical"), multi_vector_lr=1e-3)
    assert message.startswith("optim.multi_vector_lr")
    assert found(["encoder"], ("dense", "lexical"), lexical_lr=1e-3) == []
