"""Every export format: layout, what is refused. Real consumers read the folders in tests/peers."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, XLMRobertaForMaskedLM

from megam3.errors import CheckpointError, ConfigError
from megam3.export.formats import export
from megam3.export.model_card import CardFacts
from tests.export.test_bge_m3 import trained
from tests.factory import make_tiny_model_folder, tiny_config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny_model_folder(tmp_path_factory.mktemp("source"), max_tokens=128, multi_vector_dim=12)


@pytest.mark.parametrize("name", ["multi-vector", "pylate"])
def test_the_head_becomes_a_dense_module(source, tmp_path, name):
    model = trained(source)
    differences = export(model.state_dict(), str(source), tmp_path / "out", format=name)
    assert differences.keys() == {"dense", "lexical", "multi_vector"}
    assert max(differences.values()) <= 1e-5
    head = load_file(tmp_path / "out" / "1_Dense" / "model.safetensors")
    assert torch.equal(head["linear.weight"], model.multi_vector_head.weight)
    config = json.loads((tmp_path / "out" / "1_Dense" / "config.json").read_text())
    assert (config["in_features"], config["out_features"], config["bias"]) == (32, 12, True)
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [module["path"] for module in modules][:2] == ["", "1_Dense"]


def test_a_model_without_the_head_is_refused_and_leaves_nothing(source, tmp_path):
    state = {k: v for k, v in trained(source).state_dict().items() if not k.startswith("multi_vector")}
    with pytest.raises(CheckpointError, match="it has no multi-vector head.*export it as bge-m3"):
        export(state, str(source), tmp_path / "out", format="pylate")
    assert list(tmp_path.iterdir()) == []


def test_heads_that_were_not_trained_are_left_out_of_the_layout(source, tmp_path):
    state = {k: v for k, v in trained(source).state_dict().items() if not k.startswith("multi_vector")}
    differences = export(state, str(source), tmp_path / "out")
    assert differences.keys() == {"dense", "lexical"}
    assert not (tmp_path / "out" / "colbert_linear.pt").exists()
    assert "BGEM3FlagModel" not in (tmp_path / "out" / "README.md").read_text()


def test_sparse_says_why_not(source, tmp_path):
    with pytest.raises(ConfigError, match="SpladePooling takes log.*use bge-m3"):
        export({}, str(source), tmp_path / "out", format="sparse")


def test_unknown_formats_and_int8_elsewhere_are_refused(source, tmp_path):
    with pytest.raises(ConfigError, match="is no export format; use one of: bge-m3, multi-vector"):
        export({}, str(source), tmp_path / "out", format="gguf")
    with pytest.raises(ConfigError, match="holds fp32 weights; use it with --format onnx"):
        export({}, str(source), tmp_path / "out", int8=True)


def test_mlm_is_read_by_transformers(source, tmp_path):
    torch.manual_seed(1)
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    mlm = XLMRobertaForMaskedLM(tiny_config(vocabulary, max_tokens=128)).eval()
    state = {name.replace("roberta.", "encoder.", 1): tensor for name, tensor in mlm.state_dict().items()}
    assert export(state, str(source), tmp_path / "out", format="mlm")["mlm"] <= 1e-5
    read = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[0, 7, 9, 2]])
    with torch.no_grad():
        assert torch.allclose(read(ids).logits, mlm(ids).logits, atol=1e-6)
    assert {"roberta.embeddings.word_embeddings.weight", "lm_head.dense.weight"} <= load_file(
        tmp_path / "out" / "model.safetensors"
    ).keys()


def test_mlm_of_a_retriever_is_refused(source, tmp_path):
    with pytest.raises(CheckpointError, match="lacks lm_head.*mlm is for checkpoints of pretraining"):
        export(trained(source).state_dict(), str(source), tmp_path / "out", format="mlm")


def test_the_card_tells_recipe_data_evaluation_and_what_others_invent(source, tmp_path):
    facts = CardFacts(
        recipe_yaml="name: demo\n",
        datasets=("miracl",),
        step="step-000010",
        evaluation={"step-000010": {"all": {"ndcg@10": 0.5}}},
    )
    export(trained(source).state_dict(), str(source), tmp_path / "out", facts=facts)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (
        "name: demo",
        "Trained on: miracl",
        "| all/ndcg@10 | 0.5000 |",
        "RANDOM weights",
        "--format pylate",
    ):
        assert part in card
