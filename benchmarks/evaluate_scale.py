"""Evaluation over an index on disk at a size that memory would not hold: seconds, queries/s, memory, bytes.

    python -m benchmarks.evaluate_scale TEXTS.jsonl FOLDER [--passages 1000000] [--queries 200]

TEXTS holds real texts under `text`, with a Hugging Face tokenizer folder named by `--tokenizer`. Passages are
runs of sentences drawn from them, so that tokens are as frequent as in the texts; every 50th repeats an
earlier one. The model is a made-up one of one layer x 64 over the real vocabulary: what is measured is
everything around a model, not a model. Queries are runs of words of passages, which are their judgements.

Everything goes through the functions that `megam3 evaluate --index` calls. Memory is what the process
allocated (RssAnon); mapped pages of the index belong to the page cache.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import XLMRobertaConfig, XLMRobertaModel

from benchmarks.index_scale import measured
from megam3.config.schema import EvaluationConfig
from megam3.embedder import M3Embedder
from megam3.retrieval.evaluate import Searched, measure
from megam3.retrieval.index.bm25 import CountsSpec, bm25_on_disk, count_tokens
from megam3.retrieval.index.build import EncodeOptions, build_index
from megam3.retrieval.index.evaluate import DiskTestSet, open_test_set
from megam3.retrieval.index.modes import FIVE_MODES, ModeOptions, rows_encoder, search_modes
from megam3.retrieval.index.vectors import encode_vectors
from megam3.retrieval.metrics import SEARCHED
from megam3.retrieval.topk import Hits

_SENTENCE = re.compile(r"[^.!?。!?؟।\n]+[.!?。!?؟।]?")
REPEATED_EVERY = 50
MAX_CHARACTERS, MAX_TOKENS, WIDTH = 400, 256, 64


def read_sentences(file: Path) -> list[list[str]]:
    """Sentences of each text that has several."""
    with file.open(encoding="utf-8") as stream:
        texts = [_SENTENCE.findall(json.loads(line)["text"]) for line in stream if line.strip()]
    return [sentences for sentences in texts if len(sentences) > 2]


def passages(sentences: Sequence[list[str]], count: int, seed: int = 0) -> Iterator[str]:
    """`count` runs of one to three sentences, of different texts in turn; some are repeated."""
    rng = random.Random(seed)
    kept: list[str] = []
    for number in range(count):
        if number % REPEATED_EVERY == REPEATED_EVERY - 1:
            yield rng.choice(kept)
            continue
        text = "".join(rng.choice(rng.choice(sentences)) for _ in range(rng.randint(1, 3)))
        text = text.strip()[:MAX_CHARACTERS]
        if len(kept) < 10_000:
            kept.append(text)
        yield text


def write_test_set(folder: Path, texts: Iterator[str], count: int, num_queries: int) -> None:
    """A folder in BEIR format; query i is the middle of the passage that is judged relevant to it."""
    (folder / "qrels").mkdir(parents=True)
    asked = set(range(0, count, max(1, count // num_queries)))
    with (
        (folder / "corpus.jsonl").open("w", encoding="utf-8") as corpus,
        (folder / "queries.jsonl").open("w", encoding="utf-8") as queries,
        (folder / "qrels" / "test.tsv").open("w", encoding="utf-8") as qrels,
    ):
        for row, text in enumerate(texts):
            corpus.write(json.dumps({"_id": f"d{row}", "text": text}, ensure_ascii=False) + "\n")
            if row in asked:
                query = text[len(text) // 3 :][:60]
                queries.write(json.dumps({"_id": f"q{row}", "text": query}, ensure_ascii=False) + "\n")
                qrels.write(f"q{row}\td{row}\t1\n")


def write_model(tokenizer: Path, folder: Path) -> None:
    """One layer x 64 with random weights over the tokenizer's vocabulary."""
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    config = XLMRobertaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=MAX_TOKENS + 2,
        type_vocab_size=1,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    XLMRobertaModel(config, add_pooling_layer=False).save_pretrained(folder)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
    ):
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, folder / name)
    head = {"weight": torch.randn(WIDTH, WIDTH) / WIDTH**0.5, "bias": torch.zeros(WIDTH)}
    torch.save(head, folder / "colbert_linear.pt")
    torch.save(
        {"weight": torch.randn(1, WIDTH) / 8, "bias": torch.full((1,), 0.1)}, folder / "sparse_linear.pt"
    )


def search(opened: DiskTestSet, embedder: M3Embedder, config: EvaluationConfig) -> dict[str, Hits]:
    """Every mode by itself, timed, with the first stages it needs."""
    pool, documents, num_queries = opened.documents.pool, opened.documents, len(opened.dataset.queries)
    spec = CountsSpec(
        passages=pool.fingerprint, num_passages=len(pool), max_tokens=MAX_TOKENS, tokenizer="made up"
    )
    with measured("counting tokens for BM25"):
        counts = count_tokens(
            pool, lambda t: embedder.token_arrays(t, max_tokens=MAX_TOKENS), opened.folder / "counts", spec
        )
    tokens = counts.tokens()[documents.pool_rows]
    print(f"{tokens.sum():,} tokens, {tokens.mean():.1f} a passage", flush=True)
    options = EncodeOptions(max_tokens=MAX_TOKENS, batch_tokens=config.batch_tokens, dense_dtype="float32")
    with measured("encoding and writing the shards"):
        index = build_index(embedder, pool, opened.folder / "index", "made up", options)
    queries = encode_vectors(
        embedder,
        opened.dataset.queries,
        max_tokens=config.query_max_tokens,
        batch_tokens=config.batch_tokens,
        new_multi=lambda shape: np.empty(shape, dtype=np.float32),
    )
    hits: dict[str, Hits] = {}
    for mode in FIVE_MODES:
        with measured(f"{mode}, its first stages included", num_queries):
            asked = ModeOptions(config=config, modes=[mode])
            rows = rows_encoder(embedder, pool, index, config.batch_tokens)
            hits |= search_modes(index, queries, asked, rows, documents)
    with measured("BM25", num_queries):
        query_ids = embedder.token_arrays(opened.dataset.queries, max_tokens=config.query_max_tokens)
        hits["BM25"] = bm25_on_disk(counts, documents, query_ids, SEARCHED)
    found = Searched(
        hits=hits, query_tokens=[len(ids) for ids in query_ids], passage_tokens=tokens, seconds=0.0
    )
    with measured("metrics"):
        result = measure(opened.dataset, found, config)
    for mode, figures in result.modes.items():
        print(f"{mode}: nDCG@10 {figures.overall['ndcg@10']:.3f}", flush=True)
    return hits


def main() -> None:
    """Write, search, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("texts", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer and config.json")
    parser.add_argument("--passages", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument(
        "--rerank", type=int, default=100, help="candidates ranked again, of each first stage"
    )
    given = parser.parse_args()
    folder = given.folder
    if not (folder / "model").exists():
        write_model(given.tokenizer, folder / "model")
    if not (folder / "test").exists():
        made = passages(read_sentences(given.texts), given.passages)
        write_test_set(folder / "test", made, given.passages, given.queries)
    config = EvaluationConfig(
        query_max_tokens=64,
        passage_max_tokens=MAX_TOKENS,
        rerank_dense=given.rerank,
        rerank_hybrid=given.rerank,
    )
    embedder = M3Embedder(str(folder / "model"), device="cpu")
    with measured("libraries and model alone"):
        time.sleep(0.2)
    with measured("reading the corpus into files"):
        opened = open_test_set(folder / "test", "test", folder / "disk")
    print(f"{len(opened.documents):,} passages, {len(opened.documents.pool):,} distinct", flush=True)
    search(opened, embedder, config)
    size = sum(path.stat().st_size for path in (folder / "disk").rglob("*") if path.is_file())
    corpus = (folder / "test" / "corpus.jsonl").stat().st_size
    print(f"{size / 2**30:.2f} GiB on disk, corpus.jsonl {corpus / 2**30:.2f}")


if __name__ == "__main__":
    main()
