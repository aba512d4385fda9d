"""The families people start from, through everything: two steps of unified training on one rank, export, and
the exported folder read by transformers, by M3Embedder and by import-model."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from megam3.cli import report_user_errors
from megam3.commands.export import main as export
from megam3.embedder import M3Embedder
from megam3.export.imported import import_model
from tests.factory import make_sentences
from tests.families import make_family_folder
from tests.launches import make_workplace, train_calls
from tests.ranks import run_ranks


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family, and the fields of section model that say how it is read."""

    family: str
    fields: tuple[str, ...] = ()
    pooling: str = "cls"
    mode: str = "pooling_mode_cls_token"
    """What sentence-transformers calls it."""


MEAN, LAST = "pooling_mode_mean_tokens", "pooling_mode_lasttoken"
BOTH_WAYS = ("model.attention=bidirectional", "model.pooling=mean")
CASES = {
    "modernbert": Case(family="modernbert"),
    "eurobert": Case(family="eurobert", fields=("model.pooling=mean",), pooling="mean", mode=MEAN),
    "qwen3": Case(family="qwen3", pooling="last", mode=LAST),
    "qwen3-both-ways": Case(family="qwen3", fields=BOTH_WAYS, pooling="mean", mode=MEAN),
    "qwen2": Case(family="qwen2", pooling="last", mode=LAST),
    "llama-both-ways": Case(family="llama", fields=BOTH_WAYS, pooling="mean", mode=MEAN),
    "mistral": Case(family="mistral", pooling="last", mode=LAST),
    "gemma3-both-ways": Case(family="gemma3_text", fields=BOTH_WAYS, pooling="mean", mode=MEAN),
    "xlm-r-mean": Case(family="xlm-roberta", fields=("model.pooling=mean",), pooling="mean", mode=MEAN),
}
MCLS = ("model.pooling=mcls", "model.cls_every_tokens=6")
CHUNKED = ("data.batch.chunk_tokens=200", "engine.activation_checkpointing=true", "engine.template=zero3")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = make_workplace(tmp_path_factory.mktemp("backbones"))
    for family in {case.family for case in CASES.values()}:
        make_family_folder(place.folder / family, family)
    return place


@pytest.fixture(scope="module")
def calls(place):
    def call(name, family, *fields):
        common = [
            "model.missing_heads=init",
            "train.steps=2",
            f"data.store_dir={place.folder}/stores/{family}",
        ]
        where = [f"name={name}", f"model.path={place.folder}/{family}"]
        return {"name": name, "arguments": [place.recipe, *where, *common, *fields]}

    made = [call(name, case.family, *case.fields) for name, case in CASES.items()]
    made += [
        call("mcls", "xlm-roberta", *MCLS),
        call("qwen3-zero3", "qwen3", *CHUNKED),
        call("qwen3-cls", "qwen3", "model.attention=bidirectional", "model.pooling=cls"),
        call("xlm-r-causal", "xlm-roberta", "model.attention=causal"),
        call("qwen3-pretrain", "qwen3", "objective={kind: pretrain}"),
    ]
    return run_ranks(train_calls, 1, made)[0]


@pytest.fixture(scope="module")
def exported(place, calls):
    def one(name):
        out = place.folder / "exports" / name
        if not out.exists():
            assert calls[name]["code"] == 0, calls[name]["said"]
            assert export([str(place.run(name) / "checkpoints" / "step-000002"), str(out)]) == 0
        return out

    return one


def pooled_by_transformers(folder, pooling, texts):
    """Padded, with the stock class that the folder's config.json selects."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        hidden = encoder(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(-1)
    last = mask.sum(1).squeeze(-1) - 1
    rows = {
        "cls": hidden[:, 0],
        "mean": (hidden * mask).sum(1) / mask.sum(1),
        "last": hidden[torch.arange(len(texts)), last],
    }
    return torch.nn.functional.normalize(rows[pooling], dim=-1).numpy()


@pytest.mark.ranks
@pytest.mark.parametrize("name", CASES)
def test_two_steps_of_training_move_the_weights(place, calls, name):
    assert calls[name]["code"] == 0, calls[name]["said"]
    losses = [row["loss/total"] for row in place.rows(name)]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


@pytest.mark.ranks
@pytest.mark.parametrize("name", CASES)
def test_the_exported_folder_is_read_alike_by_transformers(exported, name):
    folder, case = exported(name), CASES[name]
    texts = make_sentences(6, seed=5, min_words=1, max_words=30)
    ours = M3Embedder(str(folder)).encode(texts, heads=["dense"]).dense_vecs
    np.testing.assert_allclose(ours, pooled_by_transformers(folder, case.pooling, texts), atol=2e-5)
    modes = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert [key for key, value in modes.items() if value is True] == [case.mode]
    assert json.loads((folder / "megam3_config.json").read_text())["pooling"] == case.pooling


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["modernbert", "qwen3-both-ways", "gemma3-both-ways", "mistral"])
def test_an_exported_folder_comes_back_by_import(exported, tmp_path, name):
    imported = import_model(str(exported(name)), tmp_path / "again")
    assert imported.heads == ("lexical", "multi_vector")
    texts = make_sentences(3, seed=6)
    first, again = (M3Embedder(str(f)).encode(texts) for f in (exported(name), tmp_path / "again"))
    np.testing.assert_array_equal(first.dense_vecs, again.dense_vecs)
    assert first.lexical_weights == again.lexical_weights


@pytest.mark.ranks
def test_without_a_first_token_every_token_has_a_row(exported):
    text = make_sentences(1, seed=7)[0]
    for name, first in (("qwen3", 0), ("xlm-r-mean", 1)):
        embedder = M3Embedder(str(exported(name)))
        assert len(embedder.encode(text).colbert_vecs) == len(embedder.token_ids([text])[0]) - first


@pytest.mark.ranks
def test_mcls_is_kept_by_its_folder_and_left_out_of_others(exported, place):
    folder = exported("mcls")
    own = json.loads((folder / "megam3_config.json").read_text())
    assert (own["pooling"], own["cls_every_tokens"]) == ("mcls", 6)
    assert not (folder / "modules.json").exists()
    card = (folder / "README.md").read_text()
    assert "M3Embedder(FOLDER)" in card
    assert "BGEM3FlagModel" not in card
    assert M3Embedder(str(folder)).model.reading.pooling == "mcls"
    checkpoint = str(place.run("mcls") / "checkpoints" / "step-000002")
    for format in ("multi-vector", "pylate", "onnx"):
        assert report_user_errors(export, [checkpoint, str(folder.parent / "no"), "--format", format]) == 2


@pytest.mark.ranks
def test_flagembedding_is_told_of_the_pooling(exported):
    assert 'pooling_method="mean"' in (exported("xlm-r-mean") / "README.md").read_text()
    assert 'pooling_method="last_token"' in (exported("qwen3") / "README.md").read_text()


@pytest.mark.ranks
def test_chunks_checkpointing_and_zero3_give_the_same_first_loss(place, calls):
    assert calls["qwen3-zero3"]["code"] == 0, calls["qwen3-zero3"]["said"]
    plain, chunked = (place.rows(name)[0]["loss/total"] for name in ("qwen3", "qwen3-zero3"))
    assert chunked == pytest.approx(plain, rel=1e-5)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen3-cls", "puts no token of its own first: the first one is a word of the text"),
        ("xlm-r-causal", "reads in both directions only"),
        ("qwen3-pretrain", "reads left to right"),
    ],
)
def test_what_makes_no_sense_is_refused(calls, name, words):
    assert calls[name]["code"] == 2, calls[name]["said"]
    assert words in calls[name]["said"]
