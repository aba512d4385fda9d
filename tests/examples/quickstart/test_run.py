"""The whole quickstart on the user's own pairs, small: two ranks under ZeRO-3, evaluated, exported, asked."""

import json
import random

import pytest

from megam3.cli import main
from megam3.embedder import M3Embedder
from megam3.retrieval.results import read_result
from tests.factory import make_sentences


@pytest.fixture
def pairs(tmp_path):
    """Passages of made-up sentences; a query is the words of one of its passage's sentences, shuffled."""
    rng = random.Random(0)
    sentences = make_sentences(480, seed=1)
    with open(tmp_path / "pairs.jsonl", "w", encoding="utf-8") as stream:
        for i in range(0, len(sentences), 4):
            words = sentences[i + 1].split()
            query = " ".join(rng.sample(words, len(words)))
            stream.write(
                json.dumps(
                    {"query": query, "pos": [". ".join(sentences[i : i + 4])], "neg": [], "lang": "xx"}
                )
                + "\n"
            )
    return tmp_path / "pairs.jsonl"


@pytest.mark.ranks
@pytest.mark.slow
def test_trains_evaluates_exports_and_answers_from_the_users_pairs(pairs, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "quickstart",
        "--data",
        str(pairs),
        "train.steps=4",
        "train.log_every_steps=1",
        "data.batch.global_queries=16",
    ]
    assert main(arguments) == 0
    said = capfd.readouterr().out
    for mode in (
        "Dense",
        "Sparse",
        "Multi-vec",
        "Dense+Sparse",
        "All",
        "BM25",
        "answers from the exported folder",
    ):
        assert mode in said
    run = tmp_path / "runs" / "quickstart-pairs"
    result = read_result(run / "eval" / "heldout.json")
    chance = 10 / result.num_passages
    assert result.modes["All"].overall["ndcg@10"] > 3 * chance
    assert "runs/quickstart-pairs/report.html" in said
    assert "ndcg@10 over BM25" in (run / "report.html").read_text(encoding="utf-8")
    encoded = M3Embedder(str(run / "export")).encode([make_sentences(1)[0]])
    assert encoded.dense_vecs.shape == (1, 256)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "loss/total" in row] == [1, 2, 3, 4]
    # a second call finds everything done: nothing is trained again
    assert main(arguments) == 0
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        row["step"] for row in metrics
    ]
    assert "already finished: step 4 of 4" in (run / "log.txt").read_text().splitlines()[-1]


def test_a_recipe_field_that_does_not_exist_is_named_before_anything_is_fetched(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["quickstart", "train.step=4"]) == 2
    assert "train.steps" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()
