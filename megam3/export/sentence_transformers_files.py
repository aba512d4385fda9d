"""The files by which sentence-transformers reads the dense head of an exported folder.

These are the classic class paths and keys: versions 5 and 6 read them, while files saved by 5.7 and later
name classes older ones lack.
"""

import json
from pathlib import Path

_CLASSES = "sentence_transformers.models"


def write_sentence_transformers_files(out: Path, hidden_size: int, max_tokens: int) -> None:
    """modules.json, 1_Pooling/config.json and both config files into `out`: encoder, first-token pooling,
    normalisation."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    pooling = {
        "word_embedding_dimension": hidden_size,
        "pooling_mode_cls_token": True,
        "pooling_mode_mean_tokens": False,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    files: dict[str, object] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"{_CLASSES}.{name}"}
            for i, (path, name) in enumerate(modules)
        ],
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "__version__": {"sentence_transformers": "2.2.2", "transformers": "4.33.0", "pytorch": "2.1.2"}
        },
    }
    (out / "1_Pooling").mkdir()
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
