"""What a teacher is, and which kind of model a folder holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from megam3.encoders import HEAD_FILES
from megam3.errors import CheckpointError
from megam3.files import read_json
from megam3.token_layers import has_head

Pair = tuple[str, str]
"""(query, passage)."""
NO_LIMIT = 1_000_000
"""Tokens of a text where neither model nor tokenizer has a limit (tokenizers report thirty digits)."""
TeacherKind = Literal["cross-encoder", "megam3", "bi-encoder"]


class Teacher(Protocol):
    """Scores pairs."""

    def score(self, pairs: Sequence[Pair]) -> np.ndarray:
        """float32 [n], in the order given."""
        ...


def kind_of(folder: str) -> TeacherKind:
    """What the model in `folder` is: by its heads, its architecture, its modules.json, in this order.

    Raises:
        CheckpointError: none of the three kinds.
    """
    path = Path(folder)
    if any(has_head(path, head) for head in HEAD_FILES):
        return "megam3"
    try:
        config = read_json(path / "config.json")
        architectures = config.get("architectures") or []
    except FileNotFoundError:
        architectures = []
    except (OSError, ValueError, AttributeError) as error:
        rule = f"has a config.json that cannot be read ({error})"
        raise CheckpointError("--model", folder, rule, "fetch the folder again") from error
    if any(name.endswith("ForSequenceClassification") for name in architectures):
        return "cross-encoder"
    if (path / "modules.json").exists():
        return "bi-encoder"
    files = ", ".join([f"no {file}" for file in HEAD_FILES.values()])
    rule = f"is no teacher that is known: {files}, no …ForSequenceClassification, no modules.json"
    remedy = "give a cross-encoder, a megam3 folder or a sentence-transformers folder"
    raise CheckpointError("--model", folder, rule, remedy)


def num_positions(config: Any) -> int:
    """Longest text, in tokens, that a model with this config has positions for."""
    positions = getattr(config, "max_position_embeddings", None) or NO_LIMIT
    if config.model_type in ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet"):
        positions -= config.pad_token_id + 1  # their positions start after the padding id
    return positions


def padded_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Positions of texts, longest first, in batches of at most `batch_tokens` once padded to their longest.

    >>> list(padded_batches([2, 9, 3, 4], 8))
    [[1], [3, 2], [0]]
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def score_unique(pairs: Sequence[Pair], score: Callable[[Sequence[Pair]], np.ndarray]) -> np.ndarray:
    """Scores of pairs that may repeat, each scored once."""
    unique = list(dict.fromkeys(pairs))
    place = {pair: n for n, pair in enumerate(unique)}
    scores = score(unique)
    return scores[[place[pair] for pair in pairs]]
