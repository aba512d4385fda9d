"""The files by which sentence-transformers reads the dense head of an exported folder.

These are the classic class paths and keys: versions 5 and 6 read them, while files saved by 5.7 and later
name classes older ones lack.
"""

import json
from pathlib import Path

from megam3.instructions import Instructions
from megam3.reading import Pooling

_CLASSES = "sentence_transformers.models"


def write_sentence_transformers_files(
    out: Path,
    hidden_size: int,
    max_tokens: int,
    pooling: Pooling = "cls",
    instructions: Instructions | None = None,
) -> None:
    """modules.json, 1_Pooling/config.json and both config files into `out`: encoder, pooling (cls, mean or
    last), normalisation; `instructions` become its prompts."""
    modules = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modes: dict[str, object] = {
        "word_embedding_dimension": hidden_size,
        "pooling_mode_cls_token": pooling == "cls",
        "pooling_mode_mean_tokens": pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    if pooling == "last":
        # versions before 2.4 do not know the key, and read such a folder wrongly with it or without
        modes["pooling_mode_lasttoken"] = True
    files: dict[str, object] = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"{_CLASSES}.{name}"}
            for i, (path, name) in enumerate(modules)
        ],
        "1_Pooling/config.json": modes,
        "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": {
            "__version__": {"sentence_transformers": "2.2.2", "transformers": "4.33.0", "pytorch": "2.1.2"},
            # versions before 2.4 know no prompts, and pass over the key
            **({"prompts": instructions.prompts()} if instructions else {}),
        },
    }
    (out / "1_Pooling").mkdir()
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
