"""Typed access to the options of a FlagEmbedding command line (`flagembedding.py` reads and maps them)."""

import re
from collections.abc import Mapping

from megam3.errors import ConfigError

DEFAULTS = {
    "train_group_size": "8",
    "query_max_len": "32",
    "passage_max_len": "128",
    "temperature": "0.02",
    "per_device_train_batch_size": "8",
    "gradient_accumulation_steps": "1",
    "num_train_epochs": "3",
    "learning_rate": "5e-5",
    "warmup_ratio": "0",
    "weight_decay": "0",
    "max_grad_norm": "1.0",
    "seed": "42",
    "nproc_per_node": "1",
    "nnodes": "1",
    "self_distill_start_step": "-1",
    "lr_scheduler_type": "linear",
    "shuffle_ratio": "0",
    "logging_steps": "500",
}
"""FlagEmbedding's and transformers' own, of the arguments that are mapped."""


class Arguments:
    """Typed access; a default is FlagEmbedding's own."""

    def __init__(self, found: Mapping[str, list[str]]):
        self.found = found

    def text(self, name: str) -> str | None:
        """The first word given for the option, else the default."""
        values = self.found.get(name)
        return values[0] if values else DEFAULTS.get(name)

    def flag(self, name: str, default: bool = False) -> bool:
        """Given without a word, or with one that does not say no."""
        if name not in self.found:
            return default
        return not self.found[name] or self.found[name][0].lower() not in ("false", "0", "no")

    def number(self, name: str) -> float:
        """A number.

        Raises:
            ConfigError: it is none.
        """
        text = self.text(name)
        try:
            return float(text or "")
        except ValueError:
            raise ConfigError("command", f"--{name} {text}", "is not a number", "correct it") from None

    def integer(self, name: str) -> int:
        """`number`, rounded down."""
        return int(self.number(name))

    def integers(self, name: str) -> list[int]:
        """Whole numbers; `64 128`, `64,128` and `[64, 128]` are the same.

        Raises:
            ConfigError: one is none.
        """
        words = re.findall(r"[^\s,\[\]]+", " ".join(self.found.get(name) or []))
        try:
            return [int(word) for word in words]
        except ValueError:
            given = f"--{name} {' '.join(words)}"
            raise ConfigError("command", given, "are not whole numbers", "correct them") from None
