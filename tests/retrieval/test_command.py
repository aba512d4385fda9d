"""`megam3 evaluate` on a tiny random model: the whole way from files to a table, and the errors a user can
meet."""

import json
import shutil
from pathlib import Path

import pytest

from megam3.commands.evaluate import main
from megam3.embedder import M3Embedder
from megam3.errors import ConfigError, DataError
from megam3.retrieval.by_embedder import embedder_encode, embedder_tokenize
from megam3.retrieval.encode import encode_texts
from megam3.retrieval.results import read_result
from tests.factory import make_sentences, make_tiny_model_folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return make_tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def beir_folder(tmp_path) -> Path:
    folder = tmp_path / "sentences"
    (folder / "qrels").mkdir(parents=True)
    passages = make_sentences(30, seed=1, min_words=8, max_words=40)
    queries = [" ".join(passage.split()[:4]) for passage in passages[:10]]
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"_id": f"d{i}", "text": t}) + "\n" for i, t in enumerate(passages))
    )
    (folder / "queries.jsonl").write_text(
        "".join(json.dumps({"_id": f"q{i}", "text": t}) + "\n" for i, t in enumerate(queries))
    )
    (folder / "qrels" / "test.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(10)))
    return folder


def test_prints_a_table_and_writes_json(model_folder, beir_folder, tmp_path, capsys):
    arguments = [
        str(model_folder),
        str(beir_folder),
        "--out",
        str(tmp_path / "eval"),
        "--by",
        "length",
        "--passage-max-tokens",
        "9999",
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("Dense+Sparse", "BM25", "ndcg@10", "by length"))
    result = read_result(tmp_path / "eval" / "sentences.json")
    # the first words of a passage: counting words must find them
    assert result.modes["BM25"].overall["ndcg@10"] > 0.9


def test_texts_that_the_model_has_no_positions_for_are_counted_as_cut(model_folder, beir_folder, tmp_path):
    passages = [json.loads(line) for line in (beir_folder / "corpus.jsonl").read_text().splitlines()]
    long = [{**passage, "text": passage["text"] * 100} for passage in passages]
    (beir_folder / "corpus.jsonl").write_text("".join(json.dumps(passage) + "\n" for passage in long))
    for more in ([], ["--index", str(tmp_path / "index")]):
        assert (
            main([str(model_folder), str(beir_folder), "--out", str(tmp_path), "--modes", "BM25", *more]) == 0
        )
        assert read_result(tmp_path / "sentences.json").num_at_limit == len(passages)


@pytest.mark.parametrize(
    ("option", "value"), [("--rerank-dense", 0), ("--query-max-tokens", 2), ("--batch-tokens", -1)]
)
def test_numbers_that_are_too_small_are_refused_by_their_option(model_folder, beir_folder, option, value):
    with pytest.raises(ConfigError, match=f"{option} = {value}: must be at least"):
        main([str(model_folder), str(beir_folder), option, str(value)])


def test_a_test_set_is_filed_by_the_name_of_its_folder(model_folder, beir_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(beir_folder)
    given = [str(model_folder), ".", "--modes", "BM25", "--out", str(tmp_path / "results")]
    assert main(given) == 0
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["sentences.json"]
    # one file cannot hold the results of two
    again = shutil.copytree(beir_folder, tmp_path / "other" / "sentences")
    with pytest.raises(ConfigError, match="--out = 'sentences': 2 of the test sets are called so"):
        main([*given[:2], str(again), *given[2:]])


def test_modes_can_be_chosen(model_folder, beir_folder, tmp_path):
    assert main([str(model_folder), str(beir_folder), "--modes", "Sparse,BM25", "--out", str(tmp_path)]) == 0
    assert list(read_result(tmp_path / "sentences.json").modes) == ["Sparse", "BM25"]


def test_errors_come_before_the_model_is_read(beir_folder, tmp_path):
    with pytest.raises(ConfigError, match="modes = 'sparse': must be among Dense"):
        main(["no-model", str(beir_folder), "--modes", "sparse"])
    with pytest.raises(DataError, match=r"corpus\.jsonl' *: is not there"):
        main(["no-model", str(tmp_path / "nowhere")])


def test_a_checkpoint_is_told_to_be_exported_first(beir_folder, tmp_path):
    (tmp_path / "COMPLETE").touch()
    with pytest.raises(
        ConfigError, match=r"is a training checkpoint, .*; export it first: megam3 export .* OUT"
    ):
        main([str(tmp_path), str(beir_folder)])


@pytest.mark.parametrize(
    ("device", "rule"), [("cuda:99", "this machine has"), ("nonsense", "is no device that torch knows")]
)
def test_a_device_that_is_not_there_is_said_before_anything_is_read(beir_folder, tmp_path, device, rule):
    with pytest.raises(ConfigError, match=f"^device = '{device}': {rule}"):
        main([str(tmp_path), str(beir_folder), "--device", device])


def test_batches_of_the_embedder_equal_its_own_encode(model_folder):
    embedder = M3Embedder(str(model_folder))
    texts = make_sentences(12, seed=2, max_words=60)
    ids = embedder_tokenize(embedder)(texts, 512)
    ours = encode_texts(embedder_encode(embedder), ids, batch_tokens=100)
    theirs = embedder.encode(texts)
    assert abs(ours.dense_ND.numpy() - theirs.dense_vecs).max() < 1e-5
    counts = (ours.lexical_offsets_N1[1:] - ours.lexical_offsets_N1[:-1]).tolist()
    for weights, values in zip(ours.lexical_weights_Z.split(counts), theirs.lexical_weights):
        assert sorted(value for value in weights.tolist() if value > 0) == pytest.approx(
            sorted(values.values()), abs=1e-5
        )


def test_an_index_on_disk_gives_the_same_results(model_folder, beir_folder, tmp_path, capsys):
    lines = (beir_folder / "corpus.jsonl").read_text()
    # copies of unjudged texts under ids of their own, and an empty one
    copies = [{**json.loads(line), "_id": f"copy-{n}"} for n, line in enumerate(lines.splitlines()[10:16])]
    with (beir_folder / "corpus.jsonl").open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in [*copies, {"_id": "e", "text": ""}]))
    for place, more in (("memory", []), ("disk", ["--index", str(tmp_path / "kept")])):
        assert main([str(model_folder), str(beir_folder), "--out", str(tmp_path / place), *more]) == 0
    memory, disk = (read_result(tmp_path / place / "sentences.json") for place in ("memory", "disk"))
    assert disk.num_passages == 37
    assert disk.modes.keys() == memory.modes.keys()
    for mode, figures in disk.modes.items():
        for name, value in figures.overall.items():
            # scores of a tiny random model lie close together: weights in half precision may swap two
            assert value == pytest.approx(memory.modes[mode].overall[name], abs=0.02), (mode, name)
    assert (disk.modes["BM25"], disk.modes["Dense"]) == (memory.modes["BM25"], memory.modes["Dense"])
    assert "shards encoded: 1 of 1" in capsys.readouterr().err
    assert {path.name.split("-")[0] for path in (tmp_path / "kept" / "sentences").iterdir()} == {
        "documents",
        "index",
        "counts",
    }


def test_a_large_corpus_goes_to_disk_by_itself(model_folder, beir_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("megam3.commands.evaluate.ON_DISK_PASSAGES", 29)
    arguments = [str(model_folder), str(beir_folder), "--modes", "BM25", "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert (beir_folder.parent / "sentences.index").is_dir()
    assert read_result(tmp_path / "out" / "sentences.json").modes["BM25"].overall["ndcg@10"] > 0.9


def test_a_corpus_of_the_size_itself_stays_in_memory(model_folder, beir_folder, monkeypatch):
    monkeypatch.setattr("megam3.commands.evaluate.ON_DISK_PASSAGES", 30)
    assert main([str(model_folder), str(beir_folder), "--modes", "BM25"]) == 0
    assert not (beir_folder.parent / "sentences.index").exists()
