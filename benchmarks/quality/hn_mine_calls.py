"""FlagEmbedding's mining of hard negatives, by the calls of its `scripts/hn_mine.py`, timed.

    PYTHON_OF_ITS_ENVIRONMENT benchmarks/quality/hn_mine_calls.py MODEL PAIRS CORPUS [--max-tokens 128]

Runs in an environment of its own and imports nothing of megam3. As there: the whole corpus is encoded in
batches sorted by length, dense vectors alone, an exact index of all of them (faiss IndexFlatIP), and a
search of 64 queries at a time; ranks 10 to 210, 15 negatives drawn. Prints seconds and the process's peak.
"""

import json
import random
import sys
import time

import faiss
import numpy as np
from FlagEmbedding import BGEM3FlagModel

BATCH, SEARCH_BATCH, LOW, HIGH, NEGATIVES = 256, 64, 10, 210, 15


def read_records(path: str) -> list[dict]:
    """The lines of a JSONL file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def main() -> None:
    """Encode, search, draw; print what it took."""
    model_path, pairs_path, corpus_path = sys.argv[1:4]
    max_tokens = int(sys.argv[sys.argv.index("--max-tokens") + 1]) if "--max-tokens" in sys.argv else 128
    corpus = list(dict.fromkeys(record["text"] for record in read_records(corpus_path)))
    records = read_records(pairs_path)
    queries = list(dict.fromkeys(record["query"] for record in records))
    model = BGEM3FlagModel(model_path, use_fp16=False, devices="cpu")
    options = {"batch_size": BATCH, "return_sparse": False, "return_colbert_vecs": False}
    began = time.monotonic()
    passages = model.encode_corpus(corpus, max_length=max_tokens, **options)["dense_vecs"]
    encoded = time.monotonic()
    asked = model.encode_queries(queries, max_length=max_tokens, **options)["dense_vecs"]
    index = faiss.IndexFlatIP(passages.shape[1])
    index.add(np.asarray(passages, dtype=np.float32))
    places = [
        index.search(np.asarray(asked[i : i + SEARCH_BATCH], dtype=np.float32), HIGH)[1]
        for i in range(0, len(queries), SEARCH_BATCH)
    ]
    place_of = dict(zip(queries, np.concatenate(places)))
    negatives = 0
    for record in records:
        left = [corpus[i] for i in place_of[record["query"]][LOW:HIGH] if i != -1]
        left = [text for text in left if text not in record["pos"] and text != record["query"]]
        negatives += len(random.sample(left, min(NEGATIVES, len(left))))
    seconds = time.monotonic() - began
    with open("/proc/self/status") as status:
        peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    print(
        f"{len(corpus)} passages, {len(queries)} queries, {negatives} negatives: {seconds:.1f} s, "
        f"{len(corpus) / (encoded - began):.0f} passages/s encoded, {len(corpus) / seconds:.0f} in all, "
        f"peak {int(peak) / 1024:.0f} MiB"
    )


if __name__ == "__main__":
    main()
