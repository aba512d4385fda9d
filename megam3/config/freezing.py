"""The names that `model.freeze` takes, checked without a model."""

import re
from collections.abc import Iterator, Sequence

from megam3.errors import ConfigError

NAMES = ("encoder", "embeddings", "positions")
_LAYERS = re.compile(r"^layers (\d+)\.\.(\d+)$")


def layer_range(part: str) -> tuple[int, int] | None:
    """First and last layer of `layers 0..5`; None for any other part."""
    found = _LAYERS.match(part)
    return None if found is None else (int(found[1]), int(found[2]))


def freeze_problems(parts: Sequence[str], num_layers: int | None) -> Iterator[ConfigError]:
    """Parts that nobody can freeze, in an encoder of `num_layers` (None: not known)."""
    for index, part in enumerate(parts):
        field, span = f"model.freeze.{index}", layer_range(part)
        if span is None:
            if part not in NAMES:
                rule = f"must be one of {', '.join(NAMES)}, or layers and a range"
                yield ConfigError(field, part, rule, "write for example: layers 0..5")
        elif span[0] > span[1]:
            yield ConfigError(field, part, "the range is empty", f"write layers {span[1]}..{span[0]}")
        elif num_layers is not None and span[1] >= num_layers:
            rule = f"the encoder has layers 0..{num_layers - 1}"
            yield ConfigError(field, part, rule, f"end it at {num_layers - 1} or below")
