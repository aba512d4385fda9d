"""Made-up training files and recipes for the tests of the data package."""

import json
import random
from pathlib import Path

from megam3.config.schema import BatchConfig, DataConfig, DatasetConfig
from tests.factory import make_sentences


def make_records(
    count: int, *, seed: int = 0, num_negatives: int = 0, max_words: int = 60, languages=("de", "sw", "zh")
) -> list[dict]:
    """Records with an id, of very different lengths."""
    rng = random.Random(seed)
    records = []
    for number in range(count):
        size = max(2, int(max_words * rng.random() ** 3))
        texts = make_sentences(
            2 + num_negatives, seed=seed * 100_003 + number, min_words=size, max_words=size
        )
        record = {
            "query": " ".join(texts[0].split()[:8]),
            "pos": [texts[1]],
            "neg": texts[2:],
            "lang": rng.choice(languages),
        }
        records.append(record | {"id": f"{seed}-{number}"})
    return records


def write_jsonl(path: Path, records: list) -> Path:
    """One record per line; bytes are written as they are."""
    lines = [
        record if isinstance(record, bytes) else json.dumps(record, ensure_ascii=False).encode()
        for record in records
    ]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def data_config(paths, *, dataset: dict | None = None, batch: dict | None = None, **fields) -> DataConfig:
    """A recipe's data section over one dataset `d`, small limits, no workers."""
    files = [str(path) for path in (paths if isinstance(paths, list) else [paths])]
    defaults = {
        "query_max_tokens": 32,
        "passage_max_tokens": 128,
        "length_buckets": [16, 32, 64, 128],
        "num_workers": 0,
    }
    return DataConfig(
        train=[DatasetConfig(name="d", paths=files, **(dataset or {}))],
        batch=BatchConfig(**(batch or {"global_queries": 8})),
        **(defaults | fields),
    )
