"""The drivers of the small trainings: splits share no passage, documents are whole, a cut vocabulary changes
no token."""

import json
from pathlib import Path

import pytest
import tokenizers
import torch
from transformers import AutoModel

from benchmarks.quality import cut_vocabulary, documents, planted, splits
from benchmarks.quality.arms import table
from benchmarks.quality.documents import records_of
from benchmarks.quality.random_negatives import with_random_negatives
from benchmarks.quality.splits import write_lines
from megam3.retrieval.beir import read_beir
from tests.factory import make_sentences, make_tiny_model_folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Two languages of 40 passages with two questions each."""
    for seed, language in enumerate(("aa", "bb")):
        passages = make_sentences(40, seed=seed, min_words=8, max_words=12)
        records = [
            {"query": f"{language} question {n} {part}", "pos": [passage], "neg": []}
            for n, passage in enumerate(passages)
            for part in ("one", "two")
        ]
        splits.write_lines(tmp_path / "pairs" / f"made.{language}.jsonl", records)
    return tmp_path / "pairs"


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_no_passage_is_in_two_of_training_dev_and_test(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert splits.main([str(pairs), str(out), "--train", "aa", "--heldout", "bb"]) == 0
    trained = {record["pos"][0] for record in read_lines(out / "train" / "aa.jsonl")}
    dev, test, heldout = (read_beir(str(out / name), "test") for name in ("dev", "test", "heldout"))
    assert trained.isdisjoint(dev.passages)
    assert trained.isdisjoint(test.passages)
    assert set(dev.passages).isdisjoint(test.passages)
    assert len(trained) + len(dev.passages) + len(test.passages) == 40
    for each in (dev, test):
        assert len(each.queries) == 2 * len(each.passages) > 0
    assert set(heldout.languages) == {"bb"}
    assert len(heldout.passages) == 40
    assert {record["text"] for record in read_lines(out / "corpus.jsonl")} == trained


def test_a_language_to_choose_on_and_to_report_on_shares_no_passage(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    lists = ["--train", "aa", "--heldout", "bb", "--test-heldout", "bb"]
    assert splits.main([str(pairs), str(out), *lists, "--test-passages", "15"]) == 0
    heldout, test = (read_beir(str(out / name), "test") for name in ("heldout", "test-heldout"))
    assert set(heldout.passages).isdisjoint(test.passages)
    assert (len(heldout.passages), len(test.passages)) == (15, 15)


def test_articles_ask_for_a_place_of_their_document(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "articles"
    files = [str(pairs / "made.aa.jsonl")]
    assert documents.main(["articles", str(out), *files, "--passages", "4"]) == 0
    test = read_beir(str(out / "test"), "test")
    assert len(test.passages) == 3, "every fourth of ten documents, from the first"
    assert all(len(passage.split("\n")) == 4 for passage in test.passages)
    assert set(test.languages) == {f"passage-{place}" for place in range(1, 5)}
    passages = [record["pos"][0] for record in read_lines(pairs / "made.aa.jsonl")]
    for record in read_lines(out / "train.jsonl"):
        number = int(record["query"].split()[2])
        assert record["pos"][0].split("\n")[record["place"]] == passages[2 * number]


def test_texts_are_distinct_and_long_enough(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "texts.jsonl"
    files = [str(pairs / "made.aa.jsonl")] * 2
    assert documents.main(["texts", str(out), *files, "--min-characters", "1"]) == 0
    texts = [record["text"] for record in read_lines(out)]
    assert len(texts) == len(set(texts)) == 40


def test_a_cut_vocabulary_changes_no_token_and_no_output(tmp_path: Path) -> None:
    folder = make_tiny_model_folder(tmp_path / "model")
    sentences = make_sentences(5, seed=3, min_words=5, max_words=9)
    splits.write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in sentences])
    out = tmp_path / "cut"
    assert cut_vocabulary.main([str(folder), str(out), str(tmp_path / "texts.jsonl")]) == 0
    whole, small = (tokenizers.Tokenizer.from_file(str(f / "tokenizer.json")) for f in (folder, out))
    assert small.get_vocab_size() < whole.get_vocab_size()
    encoders = [AutoModel.from_pretrained(f, add_pooling_layer=False).eval() for f in (folder, out)]
    for text in sentences:
        assert whole.encode(text).tokens == small.encode(text).tokens
        hidden = [
            encoder(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state
            for encoder, tokenizer in zip(encoders, (whole, small))
        ]
        assert torch.equal(*hidden)


def test_the_table_has_mean_spread_and_change_against_the_start() -> None:
    modes = {"Dense": 0.5, "Sparse": 0.5, "Multi-vec": 0.5, "Dense+Sparse": 0.5, "All": 0.5}
    rows = [
        {"arm": "start", "seed": 0, "test": "dev", "modes": modes},
        {"arm": "a", "seed": 0, "test": "dev", "modes": modes | {"Dense": 0.6}},
        {"arm": "a", "seed": 1, "test": "dev", "modes": modes | {"Dense": 0.8}},
        {"arm": "a", "seed": 1, "test": "other", "modes": modes | {"Dense": 0.0}},
    ]
    line = table(rows, "start", "dev").splitlines()[-1]
    # mean 0.7, standard deviation of a sample of two 0.2/sqrt(2), change 0.7 - 0.5
    assert line.startswith("| a | 2 | 0.7000 ± 0.1414 (+0.2000) | 0.5000 ± 0.0000 (+0.0000) |")


def test_planted_false_negatives_are_counted_by_rule_and_by_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = [{"query": f"q{n}", "pos": [" ".join(f"w{n}{k}" for k in range(10))]} for n in range(3)]
    write_lines(tmp_path / "pages.jsonl", pages)
    planted.make(tmp_path, [tmp_path / "pages.jsonl"], 2)
    assert "2 queries, 7 passages, 4 of them planted" in capsys.readouterr().out
    texts = {record["of"]: [] for record in records_of(tmp_path / "planted.jsonl")}
    for record in records_of(tmp_path / "planted.jsonl"):
        texts[record["of"]].append(record["text"])
    mined, filtered = [], []
    for record in records_of(tmp_path / "pairs.jsonl"):
        near, far = texts[record["pos"][0]]
        assert set(near.split()) < set(record["pos"][0].split()), "a fifth of the words is gone"
        assert sorted(far.split()) == sorted(record["pos"][0].split()), "only the order differs"
        scores = {near: 0.97, far: 0.91, "honest": 0.96, "easy": 0.2}
        mined.append(
            {**record, "neg": list(scores), "neg_scores": list(scores.values()), "pos_scores": [1.0]}
        )
        filtered.append({**record, "neg": [text for text, score in scores.items() if score <= 0.95]})
    write_lines(tmp_path / "mined.jsonl", mined)
    write_lines(tmp_path / "ratio.jsonl", filtered)
    planted.report(tmp_path)
    said = capsys.readouterr().out
    assert "4 of 4 planted are among the candidates, with 4 others" in said
    assert "| ratio 0.95 | 50.0% | 50.0% | 0.0% |" in said
    assert "| ratio 0.9 | 100.0% | 50.0% | 0.0% |" in said
    assert planted.confirm(tmp_path, tmp_path / "ratio.jsonl") == (0.5, 0.5)


def test_random_negatives_are_never_known_positives() -> None:
    records = [{"query": f"q{n % 3}", "pos": [f"p{n}"], "neg": []} for n in range(6)]
    out = with_random_negatives(records, negatives=4, seed=0)
    assert [(each["query"], each["pos"]) for each in out] == [
        (each["query"], each["pos"]) for each in records
    ]
    for number, each in enumerate(out):
        assert len(set(each["neg"])) == 4
        assert {f"p{number}", f"p{(number + 3) % 6}"}.isdisjoint(each["neg"]), "both answer this question"
