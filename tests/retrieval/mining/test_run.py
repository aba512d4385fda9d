"""Mining from files to a file against a naive pass over all pairs; resuming, ranks, bad input."""

import json

import numpy as np
import pytest

from megam3.cli import main
from megam3.embedder import M3Embedder
from megam3.errors import DataError
from megam3.retrieval import parts
from megam3.retrieval.mining import run
from tests.data.pairs import write_jsonl
from tests.factory import make_sentences, make_tiny_model_folder

SENTENCES = make_sentences(60, seed=3)
RECORDS = [
    {
        "query": make_sentences(1, seed=100 + n)[0],
        "pos": SENTENCES[2 * n : 2 * n + 1 + n % 2],
        "id": str(n),
        "extra": n,
    }
    for n in range(10)
]
# one query twice with another positive: neither may become its negative
RECORDS.append({"query": RECORDS[0]["query"], "pos": [SENTENCES[40]], "neg": [SENTENCES[41]]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model_folder(tmp_path_factory.mktemp("model"), max_tokens=64)


@pytest.fixture
def place(tmp_path):
    corpus = [{"_id": f"d{n}", "title": "", "text": text} for n, text in enumerate(SENTENCES)]
    corpus += [{"text": SENTENCES[5]}, {"text": ""}, {"text": RECORDS[3]["query"]}]
    write_jsonl(tmp_path / "corpus.jsonl", corpus)
    write_jsonl(tmp_path / "pairs.jsonl", RECORDS)
    return tmp_path


def mine(place, folder, *more, output="mined.jsonl", corpus=True):
    arguments = [str(place / "pairs.jsonl"), "--model", str(folder), "--output", str(place / output)]
    arguments += ["--corpus", str(place / "corpus.jsonl")] if corpus else []
    code = main(["mine", *arguments, "--device", "cpu", "--dense-dtype", "float32", *more])
    lines = (place / output).read_text().splitlines() if (place / output).exists() else []
    return code, [json.loads(line) for line in lines]


def stored_scores(embedder, query, texts, by):
    """Scores with passages as an index keeps them: lexical weights and multi-vector rows in float16."""
    q, p = embedder.encode(query), embedder.encode(texts)
    half = [{t: float(np.float16(w)) for t, w in weights.items()} for weights in p.lexical_weights]
    scores = {
        "dense": p.dense_vecs @ q.dense_vecs,
        "lexical": [sum(w * each.get(t, 0.0) for t, w in q.lexical_weights.items()) for each in half],
        "multi_vector": [
            (q.colbert_vecs @ rows.astype(np.float16).astype(np.float32).T).max(axis=1).mean()
            for rows in p.colbert_vecs
        ],
    }
    scores["sum"] = scores["dense"] + 0.3 * np.array(scores["lexical"]) + np.array(scores["multi_vector"])
    return np.asarray(scores[by])


FILTERS = {
    "ratio 0.98": (["--ratio", "0.98"], lambda score, own: score <= min(own) - 0.02 * abs(min(own))),
    "ratio 0.9 of the best": (
        ["--ratio", "0.9", "--positive-score", "max"],
        lambda score, own: score <= max(own) - 0.1 * abs(max(own)),
    ),
    "margin": (["--margin", "0.03"], lambda score, own: score <= min(own) - 0.03),
    "limits": (["--max-score", "0.93", "--min-score", "0.88"], lambda score, own: 0.88 <= score <= 0.93),
    "ratio and limit": (
        ["--ratio", "0.98", "--max-score", "0.88"],
        lambda score, own: score <= min(0.88, min(own) - 0.02 * abs(min(own))),
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_keep_of_the_unfiltered_what_their_rule_allows(place, folder, name):
    options, is_kept = FILTERS[name]
    everything = ["--range", "0-64", "--negatives", "64", "--sample", "first"]
    _, before = mine(place, folder, *everything, output="before.jsonl")
    code, after = mine(place, folder, *everything, *options)
    assert code == 0
    taken = 0
    for whole, filtered in zip(before, after, strict=True):
        own = whole["pos_scores"]
        kept = [t for t, score in zip(whole["neg"], whole["neg_scores"]) if is_kept(score, own)]
        assert filtered["neg"] == kept
        taken += len(whole["neg"]) - len(kept)
    report = json.loads((place / "mined.jsonl.report.json").read_text())
    reasons = ("margin", "ratio", "max score", "min score")
    assert taken == sum(report["taken_out"].get(reason, 0) for reason in reasons) > 0


@pytest.mark.parametrize("by", ["dense", "lexical", "multi_vector", "sum"])
def test_negatives_are_those_of_a_naive_pass(place, folder, by):
    code, got = mine(
        place,
        folder,
        "--candidates",
        by,
        "--range",
        "2-64",
        "--negatives",
        "64",
        "--ratio",
        "0.97",
        "--sample",
        "first",
    )
    assert code == 0
    embedder = M3Embedder(folder, device="cpu")
    texts = [*SENTENCES, RECORDS[3]["query"]]
    assert [record["query"] for record in got] == [record["query"] for record in RECORDS]
    for record, before in zip(got, RECORDS):
        scores = stored_scores(embedder, record["query"], texts, by)
        known = {text for other in RECORDS if other["query"] == record["query"] for text in other["pos"]}
        order = sorted(range(len(texts)), key=lambda p: -scores[p])
        order = [p for p in order if by != "lexical" or scores[p] > 0][2:64]
        lowest = min(scores[texts.index(text)] for text in record["pos"])
        wanted = [
            p
            for p in order
            if texts[p] not in known
            and texts[p] != record["query"]
            and scores[p] <= lowest - 0.03 * abs(lowest)
        ]
        assert record["neg"] == [texts[p] for p in wanted]
        np.testing.assert_allclose(record["neg_scores"], [scores[p] for p in wanted], atol=1e-5)
        own = [scores[texts.index(text)] for text in record["pos"]]
        np.testing.assert_allclose(record["pos_scores"], own, atol=1e-5)
        assert {k: v for k, v in record.items() if k not in ("neg", "pos_scores", "neg_scores")} == {
            k: v for k, v in before.items() if k != "neg"
        }


@pytest.mark.parametrize("by", ["dense", "sum"])
def test_positives_are_read_from_the_index_or_encoded_where_it_lacks_them(place, folder, by, monkeypatch):
    lacking = {text for n, record in enumerate(RECORDS) if n % 2 for text in record["pos"]}
    write_jsonl(place / "corpus.jsonl", [{"text": text} for text in SENTENCES if text not in lacking])
    encoded = []
    original = run._Miner._encode
    monkeypatch.setattr(
        run._Miner,
        "_encode",
        lambda self, texts, limit: encoded.extend(texts) or original(self, texts, limit),
    )
    code, got = mine(place, folder, "--candidates", by, "--range", "2-40")
    assert code == 0
    queries = {record["query"] for record in RECORDS}
    assert set(encoded) - queries == lacking, "the others lie in the index"
    embedder = M3Embedder(folder, device="cpu")
    for record in got:
        exact = embedder.score([(record["query"], text) for text in record["pos"]])[by]
        stored = stored_scores(embedder, record["query"], record["pos"], by)
        wanted = [e if text in lacking else s for text, e, s in zip(record["pos"], exact, stored)]
        np.testing.assert_allclose(record["pos_scores"], wanted, atol=1e-5)


def test_the_report_counts_every_candidate_once(place, folder, capsys):
    mine(place, folder, "--range", "1-30", "--negatives", "5", "--margin", "0.0")
    report = json.loads((place / "mined.jsonl.report.json").read_text())
    assert (report["queries"], report["passages"]) == (11, 61)
    assert (report["duplicate_passages"], report["empty_passages"]) == (1, 1)
    assert report["candidates_in_range"] == 11 * 29
    assert report["taken_out"]["out of range"] == 11
    assert len(report["examples"]) == 3
    shown = capsys.readouterr().out
    assert "taken out: margin" in shown
    assert "negatives" in shown


def test_passages_of_the_records_are_the_pool_without_a_corpus(place, folder):
    code, got = mine(place, folder, "--range", "0-40", "--negatives", "3", corpus=False)
    assert code == 0
    pool = {text for record in RECORDS for text in [*record["pos"], *record.get("neg", [])]}
    assert all(set(record["neg"]) <= pool for record in got)
    assert all(len(record["neg"]) == 3 for record in got)


def test_kept_negatives_come_first_and_scores_are_left_out(place, folder):
    options = ("--range", "0-40", "--negatives", "2", "--keep-negatives", "--no-scores")
    _, got = mine(place, folder, *options)
    assert got[-1]["neg"][0] == SENTENCES[41]
    assert len(got[-1]["neg"]) in (2, 3)
    assert not any("neg_scores" in record for record in got)


def test_a_killed_run_continues_and_gives_the_same_file(place, folder, monkeypatch):
    monkeypatch.setattr(run, "PART_BYTES", 400)
    options = ("--range", "0-40", "--negatives", "4")
    _, whole = mine(place, folder, *options, output="whole.jsonl")
    original, done = run._Miner.mine_unit, []

    def dies(self, unit, emit):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(unit)
        return original(self, unit, emit)

    monkeypatch.setattr(run._Miner, "mine_unit", dies)
    with pytest.raises(KeyboardInterrupt):
        mine(place, folder, *options)
    again = []
    monkeypatch.setattr(run._Miner, "mine_unit", lambda s, u, e: again.append(u) or original(s, u, e))
    _, got = mine(place, folder, *options)
    assert got == whole
    assert again
    assert not set(again) & set(done)
    assert not list((place / "mined.jsonl.work").glob("parts-*"))


def test_another_seed_draws_others_from_the_same_index(place, folder):
    work = ("--work", str(place / "work"), "--range", "0-50", "--negatives", "4")
    _, first = mine(place, folder, *work)
    stamp = {p: p.stat().st_mtime_ns for p in (place / "work").rglob("*.npy")}
    _, second = mine(place, folder, *work, "--seed", "1", output="other.jsonl")
    assert {p: p.stat().st_mtime_ns for p in (place / "work").rglob("*.npy")} == stamp
    assert [record["neg"] for record in first] != [record["neg"] for record in second]


def test_an_output_that_exists_is_left_alone(place, folder, capsys):
    (place / "mined.jsonl").write_text("mine\n")
    assert (
        main(
            [
                "mine",
                str(place / "pairs.jsonl"),
                "--model",
                str(folder),
                "--output",
                str(place / "mined.jsonl"),
            ]
        )
        == 2
    )
    assert "output = " in capsys.readouterr().err
    assert (place / "mined.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": "a", "neg": ["b"]}, "pairs.jsonl:2 pos = None: must hold at least one passage"),
        (
            {"query": "a", "pos": ["b"], "pos_scores": [1, 2]},
            "pairs.jsonl:2 pos_scores = .*must hold 1 teacher",
        ),
        ({"text": "a"}, "pairs.jsonl:2 = .*: must hold a query and its positives"),
        (["a"], "pairs.jsonl:2 = .*: must be a JSON object"),
    ],
)
def test_bad_records_are_named(tmp_path, record, message):
    write_jsonl(tmp_path / "pairs.jsonl", [RECORDS[0], record])
    with pytest.raises(DataError, match=message):
        list(run.read_pairs(run.units_of([str(tmp_path / "pairs.jsonl")])[0]))


@pytest.mark.parametrize(
    ("corpus", "options", "message"),
    [
        ([{"text": ""}], (), "corpus = None: holds no passage (1 empty texts)"),
        ([{"_id": "d1"}], (), "corpus.jsonl:1 = {'_id': 'd1'}: must hold a string under `text`"),
        (
            [{"text": "a"}],
            (),
            "corpus = 1: fewer passages than the range 10-210 begins after; give a larger corpus",
        ),
        ([{"text": t} for t in SENTENCES], ("--min-score", "3"), "none of 11 queries got a negative"),
        ([{"text": "a"}], ("--range", "ten"), "--range = 'ten': must be two ranks"),
    ],
)
def test_what_cannot_be_mined_is_said(place, folder, capsys, corpus, options, message):
    write_jsonl(place / "corpus.jsonl", corpus)
    assert mine(place, folder, *options)[0] == 2
    assert message in capsys.readouterr().err


def test_a_model_folder_that_is_missing_is_said(place, capsys):
    assert mine(place, "nowhere")[0] == 2
    assert "model = 'nowhere': is no folder on this machine" in capsys.readouterr().err


def test_fewer_candidates_than_asked_are_reported(place, folder, caplog):
    _, got = mine(place, folder, "--range", "50-500", "--negatives", "40")
    assert "the corpus has 61 passages: the range ends there, not at 500" in caplog.text
    report = json.loads((place / "mined.jsonl.report.json").read_text())
    assert report["queries_with_fewer_than_asked"] == 11
    assert max(len(record["neg"]) for record in got) <= 11


def test_part_names_follow_their_settings():
    assert parts.digest({"a": 1, "b": 2}) == parts.digest({"b": 2, "a": 1})
    assert parts.digest(1) != parts.digest(2)
