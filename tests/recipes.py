"""Small recipes for tests: the least that validates, and a way to change it."""

import json
from pathlib import Path
from typing import Any

from megam3.config.load import parse_config
from megam3.config.schema import RunConfig
from megam3.encoders import HEAD_FILES

MINIMAL: dict[str, Any] = {
    "name": "test",
    "model": {"path": "encoder"},
    "data": {"train": [{"name": "pairs", "paths": ["pairs.jsonl"]}], "batch": {"global_queries": 8}},
    "optim": {"lr": 1e-4},
    "train": {"steps": 10},
}


def make_config(**changes: Any) -> RunConfig:
    """MINIMAL with fields replaced; `data__batch__chunk_tokens=9000` is data.batch.chunk_tokens."""
    data = json.loads(json.dumps(MINIMAL))
    for key, value in changes.items():
        node = data
        *sections, name = key.split("__")
        for section in sections:
            node = node[int(section)] if section.isdecimal() else node.setdefault(section, {})
        node[name] = value
    return parse_config(data)


def write_encoder_config(folder: Path, **changes: Any) -> Path:
    """A folder with the config.json of BGE-M3's encoder, fields replaced, and empty files where its heads
    would be."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = {
        "model_type": "xlm-roberta",
        "max_position_embeddings": 8194,
        "pad_token_id": 1,
        "vocab_size": 250002,
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(encoder))
    for name in HEAD_FILES.values():
        (folder / name).touch()
    return folder
