"""A model exported after training some heads only: everything offers those, and says so for the others."""

import json

import numpy as np
import pytest
import torch

from megam3.cli import main
from megam3.config.objective import HeadWeights
from megam3.config.schema import ModelConfig
from megam3.embedder import M3Embedder
from megam3.errors import ConfigError
from megam3.export.formats import export
from megam3.model import m3
from megam3.model.m3 import represent
from megam3.model.pretrained import load_m3
from megam3.packed_texts import pack_texts
from tests.data.pairs import write_jsonl
from tests.factory import make_sentences, make_tiny_model_folder, random_token_ids

SENTENCES = make_sentences(40, seed=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_tiny_model_folder(tmp_path_factory.mktemp("whole"), max_tokens=64)


def of_heads(whole, out, heads, format="bge-m3"):
    state = load_m3(str(whole), ModelConfig(path=str(whole)), heads=heads).state_dict()
    export(state, str(whole), out, format=format)
    return out


@pytest.fixture(scope="module")
def dense(whole, tmp_path_factory):
    return of_heads(whole, tmp_path_factory.mktemp("dense") / "model", ("dense",))


@pytest.fixture(scope="module")
def test_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beir") / "toy"
    (folder / "qrels").mkdir(parents=True)
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"d{n}", "text": t} for n, t in enumerate(SENTENCES)])
    write_jsonl(folder / "queries.jsonl", [{"_id": f"q{n}", "text": SENTENCES[n]} for n in range(5)])
    lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(5))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("heads", [("dense",), ("dense", "lexical"), ("dense", "multi_vector"), ("lexical",)])
def test_the_embedder_offers_what_is_there_and_it_equals_the_whole_model(whole, tmp_path, heads):
    embedder = M3Embedder(of_heads(whole, tmp_path / "model", heads), device="cpu")
    assert embedder.heads == ("dense", *(head for head in heads if head != "dense"))
    got, wanted = embedder.encode(SENTENCES), M3Embedder(whole, device="cpu").encode(SENTENCES)
    np.testing.assert_allclose(got.dense_vecs, wanted.dense_vecs, atol=1e-6)
    if "lexical" in heads:
        assert got.lexical_weights == wanted.lexical_weights
    else:
        assert got.lexical_weights is None
    assert (got.colbert_vecs is None) == ("multi_vector" not in heads)
    scores = embedder.score([(SENTENCES[0], SENTENCES[1])])
    assert scores.keys() == set(embedder.heads), "a sum of some heads is not the paper's sum"


def test_asking_for_a_head_that_is_not_there_is_one_message(dense):
    embedder = M3Embedder(dense, device="cpu")
    message = (
        "heads = 'lexical': the model has no lexical head, only dense; ask for those it has, or train one"
    )
    with pytest.raises(ConfigError, match=message):
        embedder.encode("a", heads=["dense", "lexical"])
    with pytest.raises(ConfigError, match="weights = 'multi_vector': the model has no multi-vector head"):
        embedder.score(("a", "b"), weights=HeadWeights(dense=1.0, lexical=0.0, multi_vector=1.0))
    alone = embedder.score(("a b", "a"), weights=HeadWeights(dense=2.0, lexical=0.0, multi_vector=0.0))
    assert alone["sum"] == pytest.approx(2 * alone["dense"])


def test_a_bare_encoder_has_its_dense_vector(tmp_path):
    folder = make_tiny_model_folder(tmp_path, heads=False, max_tokens=64)
    assert M3Embedder(folder, device="cpu").heads == ("dense",)


@pytest.mark.parametrize("format", ["bge-m3", "pylate"])
def test_evaluation_runs_in_the_modes_that_are_offered(whole, test_set, tmp_path, capsys, format):
    heads = ("dense",) if format == "bge-m3" else ("dense", "multi_vector")
    model = of_heads(whole, tmp_path / "model", heads, format)
    assert main(["evaluate", str(model), str(test_set), "--json", "--device", "cpu"]) == 0
    got = json.loads(capsys.readouterr().out)[0]["modes"]
    assert list(got) == (["Dense", "BM25"] if format == "bge-m3" else ["Dense", "Multi-vec", "BM25"])
    assert main(["evaluate", str(whole), str(test_set), "--json", "--device", "cpu"]) == 0
    wanted = json.loads(capsys.readouterr().out)[0]["modes"]
    assert got == {mode: wanted[mode] for mode in got}
    assert main(["evaluate", str(model), str(test_set), "--modes", "Dense,All", "--device", "cpu"]) == 2
    missing = "lexical, multi_vector" if format == "bge-m3" else "lexical"
    said = capsys.readouterr().err
    assert f"modes = 'All': needs the heads {missing}, which the model does not have; choose among" in said


def test_evaluation_computes_the_heads_of_its_modes_alone(whole, test_set, capsys, monkeypatch):
    command = ["evaluate", str(whole), str(test_set), "--json", "--device", "cpu"]
    assert main(command) == 0
    wanted = json.loads(capsys.readouterr().out)[0]["modes"]
    idle = {
        "Dense": ["lexical_weights", "multi_vector_rows"],
        "Dense,Sparse,Dense+Sparse": ["multi_vector_rows"],
        "Multi-vec": ["lexical_weights"],
    }
    for modes, names in idle.items():
        with monkeypatch.context() as patch:
            for name in names:
                patch.setattr(m3, name, lambda *_: pytest.fail("no mode that was asked for needs this head"))
            assert main([*command, "--modes", modes]) == 0
        got = json.loads(capsys.readouterr().out)[0]["modes"]
        assert got == {mode: wanted[mode] for mode in modes.split(",")}


def test_mining_needs_the_heads_of_its_candidates(dense, whole, tmp_path, capsys):
    pairs = [{"query": SENTENCES[n], "pos": [SENTENCES[n + 5]]} for n in range(4)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in SENTENCES])

    def mine(model, output, *more):
        arguments = [
            str(tmp_path / "pairs.jsonl"),
            "--corpus",
            str(tmp_path / "corpus.jsonl"),
            "--model",
            str(model),
        ]
        options = [
            "--output",
            str(tmp_path / output),
            "--range",
            "1-20",
            "--negatives",
            "5",
            "--device",
            "cpu",
        ]
        return main(["mine", *arguments, *options, *more])

    assert mine(dense, "a.jsonl") == 0
    assert mine(whole, "b.jsonl") == 0
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text()
    capsys.readouterr()
    for by, head in (("lexical", "lexical"), ("multi_vector", "multi-vector"), ("sum", "lexical")):
        assert mine(dense, "c.jsonl", "--candidates", by) == 2
        assert f"the model has no {head} head, only dense" in capsys.readouterr().err
    assert not (tmp_path / "c.jsonl.work").exists(), "refused before anything is encoded"


def test_search_shows_the_modes_there_are(dense, whole, tmp_path, capsys):
    write_jsonl(tmp_path / "pages.jsonl", [{"text": text} for text in SENTENCES])
    answers = {}
    for name, model in (("dense", dense), ("whole", whole)):
        index = str(tmp_path / f"{name}.index")
        query = ["--query", SENTENCES[3], "--json", "--index", index, "--device", "cpu"]
        assert main(["search", str(model), str(tmp_path / "pages.jsonl"), *query]) == 0
        answers[name] = json.loads(capsys.readouterr().out)["modes"]
    assert list(answers["dense"]) == ["Dense"]
    assert answers["dense"]["Dense"] == answers["whole"]["Dense"]
    assert len(answers["whole"]) == 5


def test_a_teacher_is_asked_for_a_head_it_has(whole, tmp_path, capsys):
    model = of_heads(whole, tmp_path / "model", ("dense", "lexical"))
    write_jsonl(tmp_path / "in.jsonl", [{"query": "a b", "pos": ["a"], "neg": ["c"]}])
    command = [
        "add-teacher-scores",
        str(tmp_path / "in.jsonl"),
        str(tmp_path / "out.jsonl"),
        "--model",
        str(model),
    ]
    assert main([*command, "--device", "cpu"]) == 2
    assert "--head = 'multi_vector': the model has no multi-vector head" in capsys.readouterr().err
    assert main([*command, "--device", "cpu", "--head", "lexical"]) == 0


def test_only_the_heads_that_are_wanted_are_computed(whole, monkeypatch):
    model = load_m3(str(whole), ModelConfig(path=str(whole))).eval()
    texts = pack_texts(random_token_ids((5, 9)))
    full = represent(model, texts)
    for module in (model.lexical_head, model.multi_vector_head):
        monkeypatch.setattr(module, "forward", lambda *_: pytest.fail("this head was not asked for"))
    alone = represent(model, texts, ["dense"])
    assert torch.equal(alone.dense_ND, full.dense_ND)
    assert alone.lexical_ids_Z.shape == (0,)
    assert alone.multi_KC.shape[0] == 0
    assert alone.pair_counts == (0, 0)
    assert alone.row_counts == (0, 0)
