"""Published test sets from small local copies in the published file formats, through the command."""

import gzip
import json
import shutil
import zipfile
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet

from megam3.commands.evaluate import main
from megam3.errors import ConfigError, DataError
from megam3.retrieval.answers import answer_qrels, holds_answer
from megam3.retrieval.beir import read_beir
from megam3.retrieval.benchmarks import fetch_benchmark
from tests.factory import make_sentences, make_tiny_model_folder

PASSAGES = make_sentences(12, seed=3, min_words=8, max_words=20)
QUERIES = [" ".join(passage.split()[:4]) for passage in PASSAGES[:4]]


def write_lines(path: Path, records: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((r if isinstance(r, str) else json.dumps(r, ensure_ascii=False)) + "\n" for r in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """Copies as on the hub, of four benchmarks over the same passages."""
    root = tmp_path_factory.mktemp("hub")
    beir = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(PASSAGES)]
    for name in ("scifact", "nq"):
        write_lines(root / f"BeIR/{name}/corpus.jsonl.gz", beir)
    questions = [{"_id": f"q{i}", "text": text} for i, text in enumerate(QUERIES)]
    write_lines(root / "BeIR/scifact/queries.jsonl.gz", questions)
    judged = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(4))]
    write_lines(root / "BeIR/scifact-qrels/test.tsv", judged)

    docs = [{"docid": f"{i}#0", "title": "T", "text": text} for i, text in enumerate(PASSAGES)]
    corpus = root / "miracl/miracl-corpus/miracl-corpus-v1.0-sw"
    write_lines(corpus / "docs-0.jsonl.gz", docs[:5])
    write_lines(corpus / "docs-1.jsonl.gz", docs[5:])
    miracl = root / "miracl/miracl/miracl-v1.0-sw"
    write_lines(
        miracl / "topics/topics.miracl-v1.0-sw-dev.tsv", [f"{i}\t{text}" for i, text in enumerate(QUERIES)]
    )
    write_lines(
        miracl / "qrels/qrels.miracl-v1.0-sw-dev.tsv",
        [f"{i}\tQ0\t{i}#0\t1" for i in range(4)] + ["0\tQ0\t7#0\t0"],
    )

    mldr = root / "Shitao/MLDR/mldr-v1.0-de"
    long_docs = [{"docid": f"doc-{i}", "text": text} for i, text in enumerate(PASSAGES)]
    write_lines(mldr / "corpus.jsonl.gz", long_docs)
    rows = [
        {
            "query_id": f"q-{i}",
            "query": text,
            "positive_passages": [long_docs[i]],
            "negative_passages": [long_docs[i + 4]],
        }
        for i, text in enumerate(QUERIES)
    ]
    write_lines(mldr / "test.jsonl.gz", rows)

    (root / "Shitao/bge-m3-data").mkdir(parents=True)
    asked = [
        {"id": i, "question": text, "answers": [" ".join(PASSAGES[i].split()[:6])]}
        for i, text in enumerate(QUERIES)
    ] + [{"id": 99, "question": QUERIES[0], "answers": ["nowhere to be found"]}]
    with zipfile.ZipFile(root / "Shitao/bge-m3-data/MKQA_test-data.zip", "w") as archive:
        archive.writestr("MKQA_test-data/fr.jsonl", "".join(json.dumps(r) + "\n" for r in asked))
    return root


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    return make_tiny_model_folder(tmp_path_factory.mktemp("model"))


def test_each_family_becomes_a_folder_in_beir_format(source, tmp_path):
    for name, split, first in (
        ("beir/scifact", "test", "d0"),
        ("miracl/sw", "dev", "0#0"),
        ("mldr/de", "test", "doc-0"),
    ):
        folder = fetch_benchmark(name, tmp_path, source=source)
        dataset = read_beir(folder, split)
        assert folder == tmp_path / name.replace("/", "-")
        assert dataset.queries == QUERIES
        assert [text.removeprefix("T ") for text in dataset.passages] == PASSAGES
        assert dataset.qrels[dataset.query_ids[0]][first] == 1
        assert sum(grade > 0 for grades in dataset.qrels.values() for grade in grades.values()) == 4
    assert read_beir(tmp_path / "miracl-sw", "dev").languages == ["sw"] * 4
    assert read_beir(tmp_path / "mldr-de").qrels["q-1"] == {"doc-1": 1, "doc-5": 0}


def test_it_is_made_once(source, tmp_path):
    folder = fetch_benchmark("beir/scifact", tmp_path, source=source)
    written = (folder / "corpus.jsonl").stat().st_mtime_ns
    # a source that is not there any more is not asked
    assert fetch_benchmark("beir/scifact", tmp_path, source=tmp_path / "gone") == folder
    assert (folder / "corpus.jsonl").stat().st_mtime_ns == written


def test_the_command_evaluates_benchmarks_by_name_and_prints_json(source, model_folder, tmp_path, capsys):
    names = ["miracl/sw", "mkqa/fr"]
    chosen = [word for name in names for word in ("--benchmark", name)]
    places = ["--benchmark-source", str(source), "--benchmark-cache", str(tmp_path), "--json"]
    assert main([str(model_folder), *chosen, *places, "--modes", "Sparse,BM25"]) == 0
    miracl, mkqa = json.loads(capsys.readouterr().out)
    assert (miracl["dataset"], mkqa["dataset"]) == ("miracl-sw", "mkqa-fr")
    # a query of a passage's first words: counting words finds it
    assert miracl["modes"]["BM25"]["overall"]["recall@100"] == 1.0
    # four of five questions have an answer in the corpus
    assert mkqa["modes"]["BM25"]["overall"]["recall@100"] == pytest.approx(0.8)
    assert mkqa["num_queries"] == 5


def test_an_answer_is_a_run_of_whole_words_whatever_its_case_and_form():
    assert holds_answer("The ＰＡＲＩＳ metro", ["paris"])
    assert not holds_answer("Parisian life", ["paris"])
    assert not holds_answer("anything", ["", " "])
    qrels = answer_qrels({"a": ["x y"], "b": ["z"]}, {"a": ["1", "2"]}, {"1": "x, y", "2": "an X Y"})
    assert qrels == {"a": {"2": 1}, "b": {"": 1}}


def test_wrong_names_missing_files_and_no_network_are_said(source, model_folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"miracle/sw.*family among beir, miracl, mldr, mkqa"):
        fetch_benchmark("miracle/sw", tmp_path, source=source)
    with pytest.raises(ConfigError, match=r"miracl-corpus-v1\.0-yo/\*\.jsonl\.gz"):
        fetch_benchmark("miracl/yo", tmp_path, source=source)
    with pytest.raises(ConfigError, match="it holds fr"):
        fetch_benchmark("mkqa/de", tmp_path, source=source)
    assert not list(tmp_path.iterdir()), "nothing half-made stays"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"cannot be downloaded from the hub.*--benchmark-source DIR"):
        fetch_benchmark("beir/scifact", tmp_path)
    with pytest.raises(ConfigError, match="none is named.*--benchmark miracl/sw"):
        main([str(model_folder)])


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("miracl/xx", "miracl is published in ar, bn, de, en, .*; use one of these codes"),
        ("mldr/sw", "mldr is published in ar, de, en, .*, zh;"),
        ("mkqa/zh", "mkqa is published in .*, zh_cn, zh_hk, zh_tw;"),
    ],
)
def test_an_unknown_language_is_refused_before_anything_is_fetched(tmp_path, monkeypatch, name, rule):
    monkeypatch.setattr(
        "megam3.retrieval.benchmarks.snapshot_download", lambda *_, **__: pytest.fail("asked the hub")
    )
    with pytest.raises(ConfigError, match=rule):
        fetch_benchmark(name, tmp_path)
    with pytest.raises(ConfigError, match=rule):
        main(["no-model", "--benchmark", name, "--benchmark-cache", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_beir_is_read_from_the_parquet_files_of_its_repositories_too(source, tmp_path):
    """The layout since the repositories lost their loading scripts: corpus/corpus-00000-of-00001.parquet."""
    held = tmp_path / "hub"
    for part in ("corpus", "queries"):
        lines = gzip.decompress((source / f"BeIR/scifact/{part}.jsonl.gz").read_bytes()).splitlines()
        records = [{"title": "", **json.loads(line)} for line in lines]
        (held / f"BeIR/scifact/{part}").mkdir(parents=True)
        # two files, in the order of their numbers
        for number, rows in enumerate((records[:2], records[2:])):
            file = held / f"BeIR/scifact/{part}/{part}-0000{number}-of-00002.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    shutil.copytree(source / "BeIR/scifact-qrels", held / "BeIR/scifact-qrels")
    found = read_beir(fetch_benchmark("beir/scifact", tmp_path / "new", source=held))
    wanted = read_beir(fetch_benchmark("beir/scifact", tmp_path / "old", source=source))
    assert (found.passage_ids, found.passages) == (wanted.passage_ids, wanted.passages)
    assert (found.query_ids, found.queries, found.qrels) == (wanted.query_ids, wanted.queries, wanted.qrels)


def test_a_hub_that_is_not_reached_is_said_with_the_repository(tmp_path, monkeypatch):
    asked = []

    def download(repository, repo_type, allow_patterns):
        asked.append((repository, repo_type, allow_patterns))
        raise ConnectionError

    monkeypatch.setattr("megam3.retrieval.benchmarks.snapshot_download", download)
    with pytest.raises(ConfigError, match=r"cannot be downloaded from the hub \(ConnectionError\)"):
        fetch_benchmark("mkqa/fr", tmp_path)
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        fetch_benchmark("beir/nq", tmp_path)
    assert asked == [
        ("Shitao/bge-m3-data", "dataset", ["MKQA_test-data.zip"]),
        ("BeIR/nq-qrels", "dataset", ["test.tsv"]),
    ]


def test_a_file_of_another_format_is_named(source, tmp_path):
    write_lines(tmp_path / "src/BeIR/scifact/corpus.jsonl", [{"_id": "d0", "text": "a"}])
    write_lines(tmp_path / "src/BeIR/scifact/queries.jsonl", [{"_id": "q0", "text": "a"}])
    write_lines(tmp_path / "src/BeIR/scifact-qrels/test.tsv", ["q0 d0 1"])
    with pytest.raises(DataError, match=r"test\.tsv:1.*3 fields"):
        fetch_benchmark("beir/scifact", tmp_path / "cache", source=tmp_path / "src")


@pytest.mark.parametrize("packed", ["corpus.jsonl.gz", "MKQA_test-data.zip"])
def test_an_archive_that_opens_to_a_line_without_end_is_refused(source, tmp_path, packed):
    """40 KB that hold 40 MB: read no further than a line may be long."""
    hub = Path(shutil.copytree(source, tmp_path / "hub"))
    bomb = b"x" * 40_000_000
    if packed.endswith("gz"):
        (hub / "BeIR/scifact" / packed).write_bytes(gzip.compress(bomb))
    else:
        with zipfile.ZipFile(hub / "Shitao/bge-m3-data" / packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("MKQA_test-data/fr.jsonl", bomb)
    name = "beir/scifact" if packed.endswith("gz") else "mkqa/fr"
    with pytest.raises(DataError, match=r"a line has more than \d+ characters.*fetch its files again"):
        fetch_benchmark(name, tmp_path / "cache", source=hub)
