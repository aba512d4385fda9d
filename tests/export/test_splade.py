"""The expansion head in a model: beside transformers' own padded masked-LM model, in the objective whole and
chunked, and through its exported folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, XLMRobertaForMaskedLM

from megam3.batch import Progress
from megam3.config.objective import UnifiedConfig
from megam3.config.schema import ModelConfig
from megam3.config.weights import SparsityConfig
from megam3.embedder import M3Embedder
from megam3.errors import CheckpointError, ConfigError
from megam3.export.formats import export
from megam3.export.imported import import_model
from megam3.model.m3 import represent
from megam3.model.pretrained import load_m3
from megam3.objectives.unified import UnifiedObjective
from megam3.packed_texts import pack_texts
from tests.batches import batch_of, make_groups
from tests.factory import make_tiny_model_folder, random_token_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny masked-LM model with a multi-vector head beside it."""
    path = make_tiny_model_folder(tmp_path_factory.mktemp("mlm") / "tiny", max_tokens=64)
    stock = AutoModelForMaskedLM.from_pretrained(path)
    assert isinstance(stock, XLMRobertaForMaskedLM)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter in stock.lm_head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    stock.save_pretrained(path)
    return str(path)


def _config(folder: str, **changed) -> ModelConfig:
    return ModelConfig(path=folder, lexical_kind="expansion", **changed)


@torch.no_grad()
def _splade(stock, token_ids, special_ids=()) -> torch.Tensor:
    """[N, V] from the padded N × L × V logits."""
    longest = max(len(ids) for ids in token_ids)
    padded = torch.tensor([ids + [1] * (longest - len(ids)) for ids in token_ids])
    mask = (torch.arange(longest) < torch.tensor([[len(ids)] for ids in token_ids])).long()
    logits = stock(input_ids=padded, attention_mask=mask).logits
    weights = (torch.log1p(torch.relu(logits)) * mask.unsqueeze(-1)).amax(1)
    weights[:, list(special_ids)] = 0.0
    return weights


def _dense(texts, vocabulary: int) -> torch.Tensor:
    text_Z = torch.arange(texts.num_texts).repeat_interleave(texts.lexical_offsets_N1.diff())
    whole = torch.zeros(texts.num_texts, vocabulary)
    return whole.index_put((text_Z, texts.lexical_ids_Z), texts.lexical_weights_Z.detach())


def test_weights_are_those_of_the_padded_masked_lm_model(folder):
    model = load_m3(folder, _config(folder)).eval()
    stock = AutoModelForMaskedLM.from_pretrained(folder).eval()
    token_ids = random_token_ids([5, 17, 3, 40])
    texts = represent(model, pack_texts(token_ids))
    expected = _splade(stock, token_ids, model.special_ids)
    torch.testing.assert_close(_dense(texts, expected.shape[1]), expected, rtol=1e-5, atol=1e-5)
    pruned = load_m3(folder, _config(folder, expansion_top_k=7)).eval()
    few = represent(pruned, pack_texts(token_ids))
    kept = torch.zeros_like(expected).scatter(1, expected.topk(7).indices, expected.topk(7).values)
    torch.testing.assert_close(_dense(few, expected.shape[1]), kept, rtol=1e-5, atol=1e-5)


class _Engine:
    """What an objective needs, without DeepSpeed."""

    def __init__(self, folder: str):
        self.model = load_m3(folder, _config(folder, expansion_top_k=3)).double()

    def forward(self, *args):
        return self.model(*args)

    def backward(self, loss, is_last):
        loss.backward()


def test_chunks_and_tiles_give_the_gradients_of_one_pass(folder):
    section = UnifiedConfig(temperature=1.0, sparsity=SparsityConfig(ramp_steps=1))
    results = []
    for chunk_tokens, tiles in ((None, "never"), (30, "never"), (30, "always")):
        engine = _Engine(folder)
        objective = UnifiedObjective(section.model_copy(update={"loss_tiles": tiles}), chunk_tokens)
        figures = objective.run(engine, batch_of(make_groups(4, 2)), Progress())
        assert figures["loss/sparsity_query"] > 0
        named = {n: p.grad for n, p in engine.model.named_parameters() if p.grad is not None}
        results.append((float(figures["loss/total"]), named))
    for total, gradients in results[1:]:
        assert total == pytest.approx(results[0][0], rel=1e-6)
        assert gradients.keys() == results[0][1].keys()
        assert "expansion_head.dense.weight" in gradients
        for name, grad in gradients.items():
            torch.testing.assert_close(grad, results[0][1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_the_exported_folder_is_a_masked_lm_model_and_serves_every_head(folder, tmp_path):
    model = load_m3(folder, _config(folder)).eval()
    out = tmp_path / "out"
    differences = export(model.state_dict(), folder, out, format="splade")
    assert differences == {"dense": 0.0, "lexical": 0.0, "multi_vector": 0.0}
    token_ids = random_token_ids([5, 17, 3])
    # its own special ids weigh nothing now, without anybody masking them
    weights = _splade(AutoModelForMaskedLM.from_pretrained(out).eval(), token_ids)
    assert not weights[:, list(model.special_ids)].any()
    ours = _dense(represent(model, pack_texts(token_ids)), weights.shape[1])
    torch.testing.assert_close(weights, ours, rtol=1e-5, atol=1e-5)
    # the projection is the embedding matrix and stands once
    assert "lm_head.decoder.weight" not in load_file(out / "model.safetensors")
    embedder = M3Embedder(str(out))
    (one,) = embedder.encode(["print a page"]).lexical_weights
    (ids,) = embedder.token_ids(["print a page"])
    assert len(set(one) - {str(i) for i in ids}) > 0


def test_formats_and_folders_that_do_not_fit_are_refused(folder, tmp_path):
    state = load_m3(folder, _config(folder)).state_dict()
    for name in ("bge-m3", "onnx"):
        with pytest.raises(ConfigError, match="use --format splade"):
            export(state, folder, tmp_path / "out", format=name)
    with pytest.raises(ConfigError, match="which this one does not have"):
        export(
            load_m3(folder, ModelConfig(path=folder)).state_dict(), folder, tmp_path / "o", format="splade"
        )
    bare = make_tiny_model_folder(tmp_path / "bare")
    with pytest.raises(CheckpointError, match="holds no masked-LM head"):
        load_m3(str(bare), _config(str(bare)))
    from_scratch = load_m3(str(bare), _config(str(bare), missing_heads="init"))
    assert from_scratch.expansion_head is not None


@pytest.mark.parametrize(
    "settings", [{"pooling": "mean"}, {"pooling": "mcls", "cls_every_tokens": 8}, {"pooling": "cls"}]
)
def test_pooling_survives_export_and_import(folder, tmp_path, settings):
    model = load_m3(folder, _config(folder, **settings)).eval()
    out, back = tmp_path / "out", tmp_path / "back"
    export(model.state_dict(), folder, out, format="splade", settings=_config(folder, **settings))
    token_ids = random_token_ids([5, 29, 3])
    expected = represent(model, pack_texts(token_ids)).dense_ND.detach()
    import_model(str(out), str(back))
    for place in (out, back):
        read = load_m3(str(place), _config(str(place))).eval()
        assert read.reading == model.reading
        torch.testing.assert_close(represent(read, pack_texts(token_ids)).dense_ND.detach(), expected)
    by_first = load_m3(str(out), _config(str(out), pooling="cls")).eval()
    differs = (represent(by_first, pack_texts(token_ids)).dense_ND.detach() - expected).abs().max() > 1e-3
    assert differs == (settings["pooling"] != "cls")


def test_the_limit_is_what_the_model_has_positions_for(folder, tmp_path):
    """Whatever its tokenizer says: many name no limit, which transformers reads as a number of 30 digits."""
    source = shutil.copytree(folder, tmp_path / "unlimited")
    named = json.loads((source / "tokenizer_config.json").read_text())
    del named["model_max_length"]
    (source / "tokenizer_config.json").write_text(json.dumps(named))
    state = load_m3(str(source), _config(str(source))).state_dict()
    masked_lm = {name.replace("expansion_head.", "lm_head."): value for name, value in state.items()}
    masked_lm["lm_head.decoder.bias"] = masked_lm["lm_head.bias"]
    for format, weights in (("splade", state), ("mlm", masked_lm)):
        export(weights, str(source), tmp_path / format, format=format)
        assert json.loads((tmp_path / format / "tokenizer_config.json").read_text())["model_max_length"] == 64
    assert json.loads((tmp_path / "splade/sentence_bert_config.json").read_text())["max_seq_length"] == 64


def test_an_exported_folder_prunes_as_the_run_did(folder, tmp_path):
    settings = _config(folder, expansion_top_k=5)
    state = load_m3(folder, settings).state_dict()
    export(state, folder, tmp_path / "out", format="splade", settings=settings)
    weights = M3Embedder(str(tmp_path / "out")).encode(["print a page", "x"]).lexical_weights
    assert [len(of_text) for of_text in weights] == [5, 5]
