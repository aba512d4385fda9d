"""Contrastive pre-training: the dense head alone, from a folder without heads, is InfoNCE written out."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from megam3.batch import Progress
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import ModelConfig
from megam3.objectives.unified import UnifiedObjective
from tests.batches import batch_of, make_groups
from tests.factory import make_tiny_model_folder
from tests.launches import make_workplace, train_calls
from tests.ranks import run_ranks

DENSE = UnifiedConfig(heads=["dense"], temperature=0.1, mask_false_negatives=False)


class OneRank:
    """What an objective needs of an engine."""

    def __init__(self, model: torch.nn.Module):
        self.model = model
        self.forward = model

    def backward(self, loss, is_last):
        loss.backward()


@pytest.fixture(scope="module")
def headless(tmp_path_factory) -> str:
    return str(make_tiny_model_folder(tmp_path_factory.mktemp("model") / "tiny", heads=False))


def load(folder: str, section: UnifiedConfig = DENSE) -> torch.nn.Module:
    return UnifiedObjective(section).load_model(ModelConfig(path=folder), torch.float64)


def dense_of(model, ids: list[int]) -> torch.Tensor:
    hidden = model.encoder(
        torch.tensor([ids]),
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        lengths=(len(ids),),
        max_length=len(ids),
    )
    return normalize(hidden.last_hidden_state[0, 0], dim=0)


@pytest.mark.parametrize("chunk_tokens", [None, 30])
def test_loss_and_gradients_are_those_of_infonce(headless, chunk_tokens):
    groups = make_groups(6, 1)
    model = load(headless)
    assert not [name for name, _ in model.named_parameters() if not name.startswith("encoder.")]
    figures = UnifiedObjective(DENSE, chunk_tokens).run(OneRank(model), batch_of(groups), Progress())
    assert sorted(figures) == ["accuracy/dense", "dense/spread", "loss/dense", "loss/total"]

    naive = load(headless)
    queries, passages = (torch.stack([dense_of(naive, group[side]) for group in groups]) for side in (0, 1))
    expected = cross_entropy(queries @ passages.T / 0.1, torch.arange(6))
    expected.backward()
    assert figures["loss/total"].item() == pytest.approx(expected.item(), rel=1e-10)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), naive.named_parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.ranks
def test_two_ranks_train_from_a_folder_without_heads(tmp_path: Path):
    place = make_workplace(tmp_path)
    for name in ("colbert_linear.pt", "sparse_linear.pt"):
        (tmp_path / "model" / name).unlink()
    stage = ["objective.heads=[dense]", "data.passages_per_query=1", "train.steps=2", "engine.template=zero3"]
    more = ["objective.matryoshka_dims=[8, 16]", "objective.both_directions=true"]
    calls = [
        {"name": "dense", "arguments": [place.recipe, "name=dense", *stage]},
        {"name": "more", "arguments": [place.recipe, "name=more", *stage, *more]},
        {"name": "wide", "arguments": [place.recipe, "name=wide", *stage, "objective.matryoshka_dims=[33]"]},
    ]
    results = run_ranks(train_calls, 2, calls)[0]
    for name in ("dense", "more"):
        assert results[name]["code"] == 0, results[name]["said"]
        assert [row["step"] for row in place.rows(name)] == [1, 2]
    named = [name for row in place.rows("dense") for name in row]
    assert not [name for name in named if "lexical" in name or "multi" in name or "sum" in name]
    for row in place.rows("more"):
        added = (row["loss/dense_8"] + row["loss/dense_16"]) / 2 + row["loss/passage_to_query"]
        assert row["loss/total"] == pytest.approx(row["loss/dense"] + added, rel=1e-4)
    assert results["wide"]["code"] == 2
    assert "dense vectors have 32 entries; use at most 32" in results["wide"]["said"]
