"""Example queries on a run's page: what a model found, which tokens matched; every text stays text."""

import json
from pathlib import Path

import pytest

from megam3.cli import main
from megam3.embedder import M3Embedder
from megam3.report.examples import EXAMPLES_FILE, find_examples, read_examples
from megam3.report.page import page
from megam3.report.record import read_run
from tests.factory import make_sentences, make_tiny_model_folder
from tests.report.run_folders import write_run
from tests.report.test_page import measure, needs_browser, read_page

HOSTILE = '</mark><script>alert(1)</script><img src=x onerror="alert(2)"> fox'
LONG = "long-word-without-any-space-" * 8


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a test set with hostile texts, and a run whose page has their examples."""
    top = tmp_path_factory.mktemp("examples")
    make_tiny_model_folder(top / "model")
    texts = [*make_sentences(12, seed=1), HOSTILE, LONG]
    corpus = [json.dumps({"_id": f"p{n}", "title": "", "text": text}) for n, text in enumerate(texts)]
    queries = [json.dumps({"_id": f"q{n}", "text": text}) for n, text in enumerate(texts)]
    (top / "beir/qrels").mkdir(parents=True)
    (top / "beir/corpus.jsonl").write_text("\n".join(corpus) + "\n")
    (top / "beir/queries.jsonl").write_text("\n".join(queries) + "\n")
    qrels = "".join(f"q{n}\tp{n}\t1\n" for n in range(len(texts)))
    (top / "beir/qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    run = write_run(top / "run", "one")
    with (run / "recipe.yaml").open("a") as stream:
        stream.write(f"evaluation:\n  folders: [{top}/beir]\n")
    given = ["--examples", str(top / "model"), "--queries", "14", "--top", "2"]
    assert main(["report", str(run), *given]) == 0
    return top


def test_each_query_has_its_best_passages_in_every_mode(place: Path) -> None:
    notes: list[str] = []
    examples = read_examples(place / "run", notes)
    assert (len(examples), notes) == (14, [])
    example = examples[0]
    assert (example.query, example.test_set) == (make_sentences(12, seed=1)[0], "beir")
    assert list(example.modes) == ["Dense", "Sparse", "Multi-vec", "Dense+Sparse", "All"]
    # the query is a passage of the corpus: dense vectors of equal texts are equal
    best = example.modes["Dense"][0]
    assert best.is_relevant
    assert best.score == pytest.approx(1.0, abs=1e-4)
    assert "".join(piece.text for piece in best.segments) == example.query
    # what the words of a passage contributed adds up to the scores that the model gives the pair
    scores = M3Embedder(str(place / "model"), device="cpu").score((example.query, example.query))
    assert sum(piece.multi_vector for piece in best.segments) <= scores["multi_vector"] + 1e-4
    assert any(piece.lexical > 0 for piece in best.segments) == (scores["lexical"] > 0)
    assert [hit.is_relevant for hit in example.modes["Dense"]].count(True) == 1


def test_passages_that_hold_an_answer_are_relevant(place: Path, tmp_path: Path) -> None:
    """A test set as MKQA's: no judgements, but answers."""
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n")
    (tmp_path / "corpus.jsonl").write_text((place / "beir/corpus.jsonl").read_text())
    query = {"_id": "q", "text": make_sentences(12, seed=1)[0], "answers": [make_sentences(12, seed=1)[0]]}
    (tmp_path / "queries.jsonl").write_text(json.dumps(query) + "\n")
    (example,) = find_examples(
        str(place / "model"), str(tmp_path), tmp_path / "run", num_queries=1, num_hits=2, device="cpu"
    )
    assert [hit.is_relevant for hit in example.modes["Dense"]] == [True, False]


def test_queries_are_spread_over_the_test_set(place: Path) -> None:
    found = find_examples(
        str(place / "model"), str(place / "beir"), place / "run", num_queries=3, num_hits=1, device="cpu"
    )
    queries = [json.loads(line)["text"] for line in (place / "beir/queries.jsonl").read_text().splitlines()]
    assert [queries.index(example.query) for example in found] == [0, 4, 9]


def test_the_page_shows_matches_in_colour_and_in_words(place: Path) -> None:
    html = (place / "run/report.html").read_text(encoding="utf-8")
    reader = read_page(html)
    marks = [names for tag, names in reader.elements if tag == "mark"]
    assert any("multi-vector 0.0" not in (names.get("title") or "multi-vector 0.0") for names in marks)
    assert all("--lex:" in str(names["style"]) and "--mul:" in str(names["style"]) for names in marks)
    assert reader.words.count("relevant") >= 14
    assert {"Example queries", "Dense+Sparse", "Modes by length of the query"} - set(reader.words) == {
        "Modes by length of the query"
    }
    # and a page of two runs says whose they are
    both = page([read_run(place / "run"), read_run(write_run(place / "other", "other"))])
    assert both.count("<h3>one</h3>") == 1


def test_hostile_passages_and_queries_stay_text(place: Path) -> None:
    reader = read_page((place / "run/report.html").read_text(encoding="utf-8"))
    assert not {tag for tag, _ in reader.elements} & {"script", "img"}
    assert not [names for _, names in reader.elements if any(name.startswith("on") for name in names)]
    assert any(HOSTILE in word for word in reader.words)  # as the query


@pytest.mark.parametrize(
    "damage", ["{", "[1]", '[{"query": "a"}]', '[{"modes": {"Dense": [{"segments": 3}]}}]']
)
def test_a_damaged_file_is_a_note(tmp_path: Path, damage: str) -> None:
    run = write_run(tmp_path / "run")
    (run / EXAMPLES_FILE).write_text(damage)
    record = read_run(run)
    assert record.examples == []
    assert any(note.startswith("examples.json: cannot be read") for note in record.notes)


def test_bad_input_is_one_message(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(write_run(tmp_path / "run"))
    assert main(["report", run, "--examples", str(place / "model")]) == 2
    assert "--test-set = None: is not named" in capsys.readouterr().err
    assert main(["report", run, "--examples", str(place / "nope"), "--test-set", str(place / "beir")]) == 2
    assert "is no folder on this machine" in capsys.readouterr().err
    wrong = ["--test-set", str(place / "beir"), "--queries", "0"]
    assert main(["report", run, "--examples", str(place / "model"), *wrong]) == 2
    assert "--queries = 0: must be at least 1" in capsys.readouterr().err


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_examples_fit_a_phone_and_a_screen(place: Path, tmp_path: Path, width: int) -> None:
    given, taken, _ = measure((place / "run/report.html").read_text(encoding="utf-8"), width, tmp_path)
    assert given > width - 30
    assert taken == given
