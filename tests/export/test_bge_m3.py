"""Exported folders: layout, content, what is refused; that nothing half-written stays. Other readers are in
tests/peers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

import megam3.export.bge_m3 as bge_m3
from megam3.config.schema import ModelConfig
from megam3.embedder import M3Embedder
from megam3.errors import CheckpointError
from megam3.export.bge_m3 import export_bge_m3, read_pooler, source_of_checkpoint
from megam3.export.verify import verify_folder
from megam3.model.m3 import represent
from megam3.model.pretrained import load_m3
from megam3.packed_texts import pack_texts
from tests.factory import make_sentences, make_tiny_model_folder

LAYOUT = {
    *(
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "sentencepiece.bpe.model",
    ),
    *("colbert_linear.pt", "sparse_linear.pt", "megam3_config.json", "README.md"),
    *(
        "modules.json",
        "1_Pooling/config.json",
        "sentence_bert_config.json",
        "config_sentence_transformers.json",
    ),
}


def trained(source, **fields):
    """A model whose every weight differs from its source."""
    model = load_m3(str(source), ModelConfig(path=str(source), **fields)).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny_model_folder(tmp_path_factory.mktemp("source"), max_tokens=128)


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "model"
    model = trained(source)
    return model, out, export_bge_m3(model.state_dict(), str(source), out)


def test_the_layout_is_complete_and_nothing_else_stays(exported):
    _, out, _ = exported
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == LAYOUT
    assert [entry.name for entry in out.parent.iterdir()] == ["model"]


def test_the_folder_read_back_equals_the_model(exported):
    model, out, differences = exported
    assert differences.keys() == {"dense", "lexical", "multi_vector"}
    assert max(differences.values()) <= 1e-5
    embedder = M3Embedder(out, device="cpu")
    texts = make_sentences(4, seed=8)
    with torch.no_grad():
        wanted = represent(model, pack_texts(embedder.token_ids(texts)))
    assert abs(embedder.encode(texts).dense_vecs - wanted.dense_ND.numpy()).max() <= 1e-5


def test_encoder_keys_have_no_prefix_and_the_pooler_is_the_sources(source, exported):
    model, out, _ = exported
    weights, before = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    assert weights.keys() == before.keys() == AutoModel.from_pretrained(out).state_dict().keys()
    assert torch.equal(weights["pooler.dense.weight"], before["pooler.dense.weight"])
    assert torch.equal(
        weights["embeddings.word_embeddings.weight"], model.encoder.embeddings.word_embeddings.weight
    )


def test_config_names_what_old_readers_look_for(source, exported):
    _, out, _ = exported
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    assert (config["torch_dtype"], config["architectures"]) == ("float32", ["XLMRobertaModel"])
    assert "dtype" not in config
    assert config["position_embedding_type"] == "absolute"
    assert config["layer_norm_eps"] == 1e-5
    ours = {"dtype", "transformers_version"}
    assert {key: value for key, value in before.items() if key not in ours}.items() <= config.items()


def test_heads_are_plain_tensors_under_the_published_names(exported):
    model, out, _ = exported
    for file, head in (
        ("colbert_linear.pt", model.multi_vector_head),
        ("sparse_linear.pt", model.lexical_head),
    ):
        saved = torch.load(out / file, weights_only=True)
        assert saved.keys() == {"weight", "bias"}
        assert torch.equal(saved["weight"], head.weight)


def test_a_tokenizer_saved_by_transformers_5_becomes_readable_for_4(tmp_path):
    source = make_tiny_model_folder(tmp_path / "source", max_tokens=128)
    AutoTokenizer.from_pretrained(source).save_pretrained(source)
    saved = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(
        json.dumps({**saved, "extra_special_tokens": ["<s>", "</s>"], "backend": "tokenizers"})
    )
    export_bge_m3(trained(source).state_dict(), str(source), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert not {"extra_special_tokens", "backend", "is_local"} & written.keys()
    assert (written["tokenizer_class"], written["model_max_length"]) == ("XLMRobertaTokenizer", 128)
    text = make_sentences(1)[0]
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text) == AutoTokenizer.from_pretrained(source)(
        text
    )


def test_a_narrow_head_is_announced(tmp_path):
    source = make_tiny_model_folder(tmp_path / "source", multi_vector_dim=12)
    export_bge_m3(trained(source).state_dict(), str(source), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "megam3_config.json").read_text())["multi_vector_dim"] == 12
    assert "colbert_dim=12" in (tmp_path / "out" / "README.md").read_text()


def test_the_pooler_is_found_under_a_prefix_and_in_bin_files(tmp_path):
    weight = torch.randn(3, 3)
    save_file(
        {"roberta.pooler.dense.weight": weight, "roberta.x": torch.zeros(1)}, tmp_path / "model.safetensors"
    )
    assert torch.equal(read_pooler(tmp_path)["pooler.dense.weight"], weight)
    (tmp_path / "model.safetensors").unlink()
    assert read_pooler(tmp_path) == {}
    torch.save({"pooler.dense.weight": weight, "x": weight}, tmp_path / "pytorch_model.bin")
    assert read_pooler(tmp_path).keys() == {"pooler.dense.weight"}


def test_a_difference_fails_and_leaves_no_folder(source, tmp_path, monkeypatch):
    def write_something_else(out, model, folder, facts):
        with torch.no_grad():
            model.multi_vector_head.weight.add_(1e-3)
        original(out, model, folder, facts)
        with torch.no_grad():
            model.multi_vector_head.weight.sub_(1e-3)

    original = bge_m3.write_bge_m3
    monkeypatch.setattr(bge_m3, "write_bge_m3", write_something_else)
    with pytest.raises(
        CheckpointError, match="largest difference of the multi_vector head must be at most 1e-05"
    ):
        export_bge_m3(trained(source).state_dict(), str(source), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_another_tokenizer_fails(source, exported, tmp_path):
    model, out, _ = exported
    other = make_tiny_model_folder(tmp_path / "other", vocab_size=300, max_tokens=128)
    with pytest.raises(
        CheckpointError, match="its tokenizer reads the sample texts differently; check the tokenizer files"
    ):
        verify_folder(out, model, str(other))


def test_an_existing_folder_is_not_overwritten(source, exported):
    model, out, _ = exported
    with pytest.raises(CheckpointError, match="exists already; remove it or choose another name"):
        export_bge_m3(model.state_dict(), str(source), out)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda state: state.pop("lexical_head.bias"), "it lacks lexical_head.bias"),
        (lambda state: state.update(extra=torch.zeros(1)), "it holds unknown extra"),
        (
            lambda state: state.update({"lexical_head.weight": torch.zeros(1, 8)}),
            r"it has other shapes: lexical_head.weight \(1, 8\) instead of",
        ),
    ],
)
def test_weights_of_another_model_are_refused(source, tmp_path, change, rule):
    state = dict(trained(source).state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=rf"{rule}.*; name the folder this checkpoint was trained from"):
        export_bge_m3(state, str(source), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_source_of_a_checkpoint_is_in_its_runs_recipe(source, tmp_path):
    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    checkpoint.mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"neither model.path of its run nor a model/ of its own; .*--model"
    ):
        source_of_checkpoint(checkpoint)
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(f"model: {{path: {source}}}")
    assert source_of_checkpoint(checkpoint) == str(source)
    recipe.write_text("model: {path: gone}")
    (checkpoint / "model").mkdir()
    (checkpoint / "model" / "config.json").write_text("{}")
    assert source_of_checkpoint(checkpoint) == str(checkpoint / "model"), "what the checkpoint carries itself"
