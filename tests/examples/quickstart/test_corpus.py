import json
import zlib

import pytest

from examples.quickstart.corpus import (
    corpus_from_pages,
    corpus_from_pairs,
    tenth,
    training_passages,
    training_texts,
    write_corpus,
)
from examples.quickstart.pages import Page
from megam3.errors import DataError

PAGES = [
    Page(
        language=language,
        name=f"guide/p{i}",
        title=f"{language} title {i}",
        description=f"{language} desc {i}" if i % 3 else "",
        body=f"{language} body {i}",
    )
    for language in ("de", "en")
    for i in range(60)
]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_translation_of_a_held_out_page_is_trained_on():
    corpus = corpus_from_pages(PAGES)
    held_out = {page.name for page in PAGES if zlib.crc32(page.name.encode()) % 10 == 0}
    assert held_out
    assert {query.id for query in corpus.queries} == {
        f"{language}/{name}" for language in ("de", "en") for name in held_out
    }
    bodies = {page.body for page in PAGES if page.name in held_out}
    assert not bodies & {record["pos"][0] for record in corpus.train}
    assert bodies <= set(corpus.passages.values())
    assert not {query.text for query in corpus.queries} & set(training_texts(corpus))


def test_held_out_queries_are_descriptions_or_titles_and_both_train():
    corpus = corpus_from_pages(PAGES)
    by_id = {f"{page.language}/{page.name}": page for page in PAGES}
    assert all(
        query.text == (by_id[query.id].description or by_id[query.id].title) for query in corpus.queries
    )
    trained = [page for page in PAGES if tenth(page.name) != 0]
    assert len(corpus.train) == sum(1 + bool(page.description) for page in trained)
    assert training_passages(corpus) == [page.body for page in trained]


def test_distractors_are_trained_passages_without_queries():
    corpus = corpus_from_pages(PAGES)
    extra = set(corpus.passages) - {query.id for query in corpus.queries}
    assert extra
    assert {tenth(key.split("/", 1)[1]) for key in extra} <= {1, 2}


def test_written_folder_is_beir(tmp_path):
    corpus = corpus_from_pages(PAGES)
    write_corpus(corpus, tmp_path)
    assert lines(tmp_path / "train.jsonl") == corpus.train
    assert {
        row["_id"]: row["text"] for row in lines(tmp_path / "heldout" / "corpus.jsonl")
    } == corpus.passages
    queries = lines(tmp_path / "heldout" / "queries.jsonl")
    assert [(row["_id"], row["text"], row["lang"]) for row in queries] == [
        (q.id, q.text, q.language) for q in corpus.queries
    ]
    header, *rows = (tmp_path / "heldout" / "qrels" / "test.tsv").read_text().splitlines()
    assert header == "query-id\tcorpus-id\tscore"
    assert rows == [f"{q.id}\t{q.id}\t1" for q in corpus.queries]


def test_own_pairs_are_split_by_the_positives_hash(tmp_path):
    path = tmp_path / "pairs.jsonl"
    records = [
        {"query": f"q{i}", "pos": [f"passage {i // 2}"], "neg": [f"wrong {i}"], "lang": "fi"}
        for i in range(200)
    ]
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    corpus = corpus_from_pairs(path)
    assert len(corpus.train) + len(corpus.queries) == 200
    trained = set(training_passages(corpus))
    for query in corpus.queries:
        assert query.language == "fi"
        assert tenth(corpus.passages[query.passage_ids[0]]) == 0
        assert corpus.passages[query.passage_ids[0]] not in trained


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"query": "a"', r"pairs.jsonl:2 .* is not JSON"),
        ('{"query": " ", "pos": ["x"]}', r"pairs.jsonl:2 .* needs a non-empty text under `query`"),
        (
            '{"query": "a", "pos": []}',
            r"pairs.jsonl:2 .* `pos` must be a list of at least one non-empty text; write one",
        ),
        ('{"query": "a"}', r"pairs.jsonl:2 .* `pos` must be a list"),
        ('["a"]', r"pairs.jsonl:2 .* needs a non-empty text"),
    ],
)
def test_a_bad_line_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "a", "pos": ["b"]}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        corpus_from_pairs(path)


def test_missing_file_and_too_few_pairs(tmp_path):
    with pytest.raises(
        DataError, match="DATA = .* is not a file; give a JSONL file of pairs, or leave DATA out"
    ):
        corpus_from_pairs(tmp_path / "none.jsonl")
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"query": "a", "pos": ["b"]}\n')
    with pytest.raises(DataError, match=r"gives \d training and \d held-out pairs; give a few hundred pairs"):
        corpus_from_pairs(path)
