"""A made-up test set and an encoder that is a table: representations of a text depend on its ids alone, as a
real model's would."""

import numpy as np
import torch

from megam3.batch import Representations
from megam3.retrieval.beir import BeirDataset

HIDDEN, WIDTH, VOCAB = 12, 8, 40


def text_tables(ids):
    """(dense [H], {id: weight}, rows [n - 1, C]) of one text, seeded by its ids."""
    generator = np.random.default_rng([len(ids), *ids])
    dense = generator.normal(size=HIDDEN)
    rows = generator.normal(size=(len(ids) - 1, WIDTH))
    weights = {token: float(generator.uniform(0, 1)) for token in sorted(set(ids)) if token > 3}
    return dense / np.linalg.norm(dense), weights, rows / np.linalg.norm(rows, axis=1, keepdims=True)


def encode_ids(token_ids):
    tables = [text_tables(ids) for ids in token_ids]

    def offsets(counts):
        return torch.tensor([0, *np.cumsum(counts)], dtype=torch.int64)

    return Representations(
        dense_ND=torch.tensor(np.stack([t[0] for t in tables]), dtype=torch.float32),
        lexical_weights_Z=torch.tensor([w for t in tables for w in t[1].values()], dtype=torch.float32),
        lexical_ids_Z=torch.tensor([i for t in tables for i in t[1]], dtype=torch.int64),
        lexical_offsets_N1=offsets([len(t[1]) for t in tables]),
        multi_KC=torch.tensor(np.concatenate([t[2] for t in tables]), dtype=torch.float32),
        multi_offsets_N1=offsets([len(t[2]) for t in tables]),
    )


def tokenize(texts, max_tokens):
    """Texts are numbers separated by spaces."""
    return [[0, *map(int, text.split())][: max_tokens - 1] + [2] for text in texts]


def toy_dataset(num_passages=70, num_queries=9, seed=0):
    generator = np.random.default_rng(seed)

    def text(low, high):
        return " ".join(map(str, generator.integers(4, VOCAB, size=generator.integers(low, high))))

    passages = [text(3, 30) for _ in range(num_passages)]
    queries = [text(1, 6) for _ in range(num_queries)]
    passage_ids, query_ids = [f"d{i}" for i in range(num_passages)], [f"q{i}" for i in range(num_queries)]
    qrels = {query: {f"d{generator.integers(num_passages)}": 1} for query in query_ids}
    languages = [("en", "de", "fi")[i % 3] for i in range(num_queries)]
    return BeirDataset(
        name="toy",
        passage_ids=passage_ids,
        passages=passages,
        query_ids=query_ids,
        queries=queries,
        languages=languages,
        qrels=qrels,
    )
