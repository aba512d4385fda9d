"""What the whole chain starts from, made of the user's own pairs."""

import json
import random

from examples.pipeline.prepare import START_TOKENS, main
from megam3.encoders import read_encoder_config
from megam3.retrieval.beir import read_beir
from tests.factory import make_sentences


def test_the_users_pairs_become_everything_the_chain_reads(tmp_path) -> None:
    rng = random.Random(0)
    sentences = make_sentences(480, seed=1)
    with open(tmp_path / "pairs.jsonl", "w", encoding="utf-8") as stream:
        for i in range(0, len(sentences), 4):
            words = sentences[i + 1].split()
            record = {
                "query": " ".join(rng.sample(words, len(words))),
                "pos": [". ".join(sentences[i : i + 4])],
            }
            stream.write(json.dumps(record) + "\n")
    start = tmp_path / "start"
    assert main([str(start), "--data", str(tmp_path / "pairs.jsonl")]) == 0
    lines = {
        name: [json.loads(line) for line in (start / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "texts", "few")
    }
    positives = {passage for record in lines["train"] for passage in record["pos"]}
    assert {record["text"] for record in lines["texts"]} == positives
    assert lines["few"] == lines["train"], "fewer than the limit: all of them"
    heldout = read_beir(str(start / "heldout"), "test")
    relevant = {passage for judged in heldout.qrels.values() for passage in judged}
    texts = dict(zip(heldout.passage_ids, heldout.passages))
    assert {texts[passage] for passage in relevant}.isdisjoint(positives)
    encoder = read_encoder_config(str(start / "encoder"))
    assert encoder["max_position_embeddings"] == START_TOKENS + 2
