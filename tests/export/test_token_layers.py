"""A multi-vector head of several layers through export, the folders' own files, import and merging."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoTokenizer

from megam3.config.schema import ModelConfig
from megam3.embedder import M3Embedder
from megam3.errors import CheckpointError, ConfigError
from megam3.export.formats import export
from megam3.export.imported import import_model
from megam3.export.merge import merge_folders
from megam3.export.verify import model_from_state
from megam3.model.m3 import represent
from megam3.model.pretrained import load_m3
from megam3.obs.run_folder import copy_model_files
from megam3.packed_texts import pack_texts
from tests.export.test_bge_m3 import trained
from tests.factory import make_sentences, make_tiny_model_folder

FIELDS = {"multi_vector_hidden": 48, "multi_vector_activation": "silu"}
TEXTS = [*make_sentences(4, seed=2), "x", " ".join(make_sentences(30, seed=3))]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny_model_folder(tmp_path_factory.mktemp("source"), max_tokens=128, multi_vector_dim=12)


@pytest.fixture(scope="module")
def model(source):
    return trained(source, **FIELDS)


def exported(model, source, out, format="pylate"):
    settings = ModelConfig(path=str(source), **FIELDS)
    return export(model.state_dict(), str(source), out, format=format, settings=settings)


def rows_by_torch(folder, text):
    """What the consumers compute, from the exported files alone: modules in the order of modules.json."""
    tokenizer, encoder = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        rows = encoder(**tokenizer(text, return_tensors="pt", truncation=True)).last_hidden_state[0]
        for module in json.loads((folder / "modules.json").read_text()):
            if not module["path"].endswith("_Dense"):
                continue
            config = json.loads((folder / module["path"] / "config.json").read_text())
            state = load_file(folder / module["path"] / "model.safetensors")
            activation = getattr(nn, config["activation_function"].rsplit(".", 1)[-1])()
            out = activation(rows @ state["linear.weight"].T + state["linear.bias"])
            if config["use_residual"]:
                out = out + (rows @ state["residual.weight"].T if "residual.weight" in state else rows)
            rows = out
    return nn.functional.normalize(rows, dim=-1)[1:]


@pytest.mark.parametrize("format", ["pylate", "multi-vector"])
def test_the_exported_files_say_what_the_head_computes(source, model, tmp_path, format):
    differences = exported(model, source, tmp_path / "out", format)
    assert differences.keys() == {"dense", "lexical", "multi_vector"}
    assert max(differences.values()) <= 1e-5
    kinds = [m["type"].rsplit(".", 1)[-1] for m in json.loads((tmp_path / "out/modules.json").read_text())]
    tail = ["Normalize", "MultiVectorMask"] if format == "multi-vector" else []
    assert kinds == ["Transformer", "Dense", "Dense", "Dense", *tail]
    embedder = M3Embedder(tmp_path / "out", device="cpu")
    assert embedder.heads == ("dense", "lexical", "multi_vector")
    for text, rows in zip(TEXTS, embedder.encode(TEXTS).colbert_vecs, strict=True):
        wanted = rows_by_torch(tmp_path / "out", text)
        torch.testing.assert_close(torch.from_numpy(rows), wanted, rtol=0, atol=1e-5)
        assert rows.shape[1] == 12


@pytest.mark.parametrize("format", ["bge-m3", "splade"])
def test_formats_of_one_matrix_refuse_it_by_name(source, model, tmp_path, format):
    with pytest.raises(
        ConfigError,
        match=rf"format = '{format}': holds the multi-vector head as one matrix .* use --format pylate",
    ):
        exported(model, source, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []


def test_imported_again_it_trains_on(source, model, tmp_path):
    exported(model, source, tmp_path / "out")
    imported = import_model(str(tmp_path / "out"), tmp_path / "start")
    assert imported.heads == ("lexical", "multi_vector")
    again = load_m3(str(tmp_path / "start"), ModelConfig(path=str(tmp_path / "start")))
    wanted = model.state_dict()
    assert again.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in again.state_dict().items())
    export(again.state_dict(), str(tmp_path / "start"), tmp_path / "third", format="pylate")


def test_one_layer_of_pylate_becomes_the_published_file(source, tmp_path):
    plain = trained(source)
    export(plain.state_dict(), str(source), tmp_path / "out", format="pylate")
    import_model(str(tmp_path / "out"), tmp_path / "start")
    head = torch.load(tmp_path / "start" / "colbert_linear.pt", weights_only=True)
    assert torch.equal(head["weight"], plain.multi_vector_head.weight)
    assert not list((tmp_path / "start").glob("*_Dense"))


def test_pylates_own_folders_without_bias_are_read_and_prefixes_are_told(source, model, tmp_path):
    """As mLateOn's: no bias, no activation, `[Q]` and `[D]` before texts."""
    folder = tmp_path / "theirs"
    exported(model, source, folder)
    for place in folder.glob("*_Dense"):
        config = json.loads((place / "config.json").read_text())
        config |= {"bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
        (place / "config.json").write_text(json.dumps(config))
        state = load_file(place / "model.safetensors")
        del state["linear.bias"]
        save_file(state, place / "model.safetensors")
    (folder / "megam3_config.json").unlink()
    (folder / "sparse_linear.pt").unlink()
    file = folder / "config_sentence_transformers.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), "query_prefix": "[Q] ", "document_prefix": "[D] "})
    )
    imported = import_model(str(folder), tmp_path / "start")
    assert imported.heads == ("multi_vector",)
    assert "its folder puts '[Q] ' before queries, '[D] ' before passages" in " ".join(imported.notes())
    head = load_m3(
        str(tmp_path / "start"), ModelConfig(path=str(tmp_path / "start")), heads=("dense", "multi_vector")
    ).multi_vector_head
    assert not any(head.state_dict()[f"{n}.linear.bias"].any() for n in range(3))
    weights = model.multi_vector_head.state_dict()
    product = weights["0.linear.weight"] + weights["0.residual.weight"]
    product = (weights["1.linear.weight"] + weights["1.residual.weight"]) @ product
    product = weights["2.linear.weight"] @ product
    torch.testing.assert_close(head(torch.eye(32)), product.T, rtol=0, atol=1e-5)


def test_merging_takes_the_layers_and_refuses_other_kinds(source, model, tmp_path):
    exported(model, source, tmp_path / "a")
    other = trained(source, **FIELDS)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    exported(other, source, tmp_path / "b")
    merge_folders([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out", [0.25, 0.75], "average")
    got = M3Embedder(tmp_path / "out", device="cpu").model.state_dict()
    for name, tensor in other.state_dict().items():
        if name.startswith(("multi_vector_head.", "lexical_head.")):
            wanted = 0.25 * model.state_dict()[name] + 0.75 * tensor
            torch.testing.assert_close(got[name], wanted, rtol=1e-6, atol=1e-7)
    file = tmp_path / "b" / "1_Dense" / "config.json"
    file.write_text(file.read_text().replace("SiLU", "Tanh"))
    with pytest.raises(CheckpointError, match="have multi-vector layers of other kinds"):
        merge_folders([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "no", None, "average")


def test_a_recipe_that_asks_for_other_layers_is_refused(source, model, tmp_path):
    exported(model, source, tmp_path / "out")
    folder = str(tmp_path / "out")
    for fields, message in (
        (
            {"multi_vector_hidden": 64},
            r"multi_vector_hidden = 64: .* has the layers 32 → 48 silu \+ skip → 32 \+",
        ),
        ({"multi_vector_dim": 8}, "multi_vector_dim = 8: .* has the layers 32 → 48 silu"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_m3(folder, ModelConfig(path=folder, **fields))
    same = load_m3(folder, ModelConfig(path=folder, **FIELDS))
    assert torch.equal(same.multi_vector_head[1].linear.weight, model.multi_vector_head[1].linear.weight)


def test_weights_whose_layers_nobody_names_are_refused(source, model, tmp_path):
    with pytest.raises(
        CheckpointError, match=r"nothing says what is between them.*model\.multi_vector_hidden"
    ):
        export(model.state_dict(), str(source), tmp_path / "out", format="pylate")


def test_a_checkpoints_own_files_are_enough_for_a_head_that_its_source_described(source, model, tmp_path):
    """The source is gone: layers and pooling come from what the run copied."""
    exported(model, source, tmp_path / "out")
    (tmp_path / "kept").mkdir()
    copy_model_files(tmp_path / "out", tmp_path / "kept")
    assert not list((tmp_path / "kept").rglob("*.safetensors"))
    again = model_from_state(model.state_dict(), str(tmp_path / "kept"))
    texts = pack_texts([[0, 7, 9, 2], [0, 2]])
    torch.testing.assert_close(
        represent(again, texts).multi_KC, represent(model, texts).multi_KC, rtol=0, atol=1e-6
    )


def test_a_folder_that_lost_the_weights_of_a_head_it_names_is_refused(source, model, tmp_path):
    exported(model, source, tmp_path / "out")
    (tmp_path / "out" / "sparse_linear.pt").unlink()
    with pytest.raises(CheckpointError, match="and the weights of lexical are missing; copy or export"):
        M3Embedder(tmp_path / "out", device="cpu")
    shutil.rmtree(tmp_path / "out" / "2_Dense")
    with pytest.raises(CheckpointError, match=r"modules\.json': names layers that cannot be read"):
        M3Embedder(tmp_path / "out", device="cpu")
