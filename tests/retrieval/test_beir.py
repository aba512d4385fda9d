import json

import pytest

from megam3.errors import DataError
from megam3.retrieval import beir
from megam3.retrieval.beir import read_beir

CORPUS = [
    {"_id": "d1", "title": "Fonts", "text": "Choose larger fonts."},
    {"_id": "d2", "text": "Turn the sound off."},
]
QUERIES = [
    {"_id": "q1", "text": "bigger letters", "lang": "en"},
    {"_id": "q2", "text": "leise", "metadata": {"lang": "de"}},
    {"_id": "q3", "text": "no judgement"},
    {"_id": "q4", "text": "only wrong ones"},
]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\nq2\td2\t1\nq4\td1\t0\n"


def write(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS):
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


def test_reads_titles_languages_and_judged_queries_only(tmp_path):
    dataset = read_beir(write(tmp_path / "demo"))
    assert dataset.name == "demo"
    assert dict(zip(dataset.passage_ids, dataset.passages)) == {
        "d1": "Fonts Choose larger fonts.",
        "d2": "Turn the sound off.",
    }
    assert list(zip(dataset.query_ids, dataset.queries, dataset.languages)) == [
        ("q1", "bigger letters", "en"),
        ("q2", "leise", "de"),
    ]
    assert dataset.qrels == {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}


def test_qrels_without_header(tmp_path):
    assert read_beir(write(tmp_path / "demo", qrels="q1\td1\t1\n")).query_ids == ["q1"]


@pytest.mark.parametrize("name", ["corpus.jsonl", "queries.jsonl", "qrels/test.tsv"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write(tmp_path / "demo")
    (folder / name).unlink()
    with pytest.raises(DataError, match=rf"{name}'.*is not there; a BEIR folder holds corpus\.jsonl"):
        read_beir(folder)


def test_bad_json_names_file_and_line(tmp_path):
    folder = write(tmp_path / "demo")
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "text": "x"}\n{"_id": "d2", "text"\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:2 = .*is not JSON"):
        read_beir(folder)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"_id": "d3"}, "needs `_id` and a text"),
        ({"text": "x"}, "needs `_id`"),
        ({"_id": "d1", "text": "x"}, "was there before"),
    ],
)
def test_bad_records_name_file_and_line(tmp_path, row, message):
    with pytest.raises(DataError, match=rf"corpus\.jsonl:3 = .*{message}"):
        read_beir(write(tmp_path / "demo", corpus=[*CORPUS, row]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q9\td1\t1", r"test\.tsv:2 = 'q9': names a query that queries\.jsonl does not hold"),
        ("q1\td9\t1", r"test\.tsv:2 = 'd9': names a passage that corpus\.jsonl does not hold"),
        ("q1 d1 1", r"test\.tsv:2 = .*needs three fields"),
        ("q1\td1\tgood", r"test\.tsv:2 = .*needs three fields"),
    ],
)
def test_bad_judgements(tmp_path, line, message):
    with pytest.raises(DataError, match=message):
        read_beir(write(tmp_path / "demo", qrels=f"query-id\tcorpus-id\tscore\n{line}\n"))


def test_no_positive_judgement(tmp_path):
    with pytest.raises(DataError, match="holds no judgement above 0"):
        read_beir(write(tmp_path / "demo", qrels="query-id\tcorpus-id\tscore\nq1\td1\t0\n"))


def test_a_line_without_end_is_refused_before_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(beir, "MAX_LINE_CHARACTERS", 200)
    folder = write(tmp_path / "demo", corpus=[*CORPUS, {"_id": "d3", "text": "x" * 300}])
    with pytest.raises(DataError, match=r"corpus.jsonl:3 = .*has more than 200 characters; cut the text up"):
        read_beir(folder)
