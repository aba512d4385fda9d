"""How an encoder's text becomes one dense vector, and in which direction it is read: what the recipe says,
what the model's folder says, and which combinations make sense. Free of torch.

    cls    the first token               M3, and most encoders made for `[CLS]` or `<s>`
    mean   the mean over all tokens      e5, gte
    mcls   `<s>` once more before every 256th token, the mean over all of them (MCLS of arXiv 2402.03216)
    last   the last token                models made left to right: it alone has seen the whole text

    a folder that says nothing:  cls; read left to right: last
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from megam3.encoders import FAMILIES, Direction, find_direction_problem, is_causal
from megam3.errors import ConfigError
from megam3.model_files import read_model_json, read_model_object

Pooling = Literal["cls", "mean", "mcls", "last"]
POOLINGS: tuple[str, ...] = get_args(Pooling)

CLS_EVERY_TOKENS = 256
"""Tokens from one `<s>` to the next under `mcls`, the paper's (MCLS of arXiv 2402.03216)."""
OWN_FILE = "megam3_config.json"
"""What an exported or imported folder says of itself."""
_NAMES = {"lasttoken": "last", "last_token": "last"}
"""Names of sentence-transformers (both of its styles) for the same pooling."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How the dense vector is made."""

    pooling: Pooling = "cls"
    cls_every_tokens: int = CLS_EVERY_TOKENS
    """Under `mcls`: tokens of the text from one `<s>` to the next."""

    def inserted(self, num_tokens: int) -> int:
        """Tokens that are put into a text of `num_tokens`.

        >>> Reading(pooling="mcls", cls_every_tokens=4).inserted(9)     # <s> a b c | d e f g | </s>
        2
        """
        return (num_tokens - 1) // self.cls_every_tokens if self.pooling == "mcls" and num_tokens else 0

    def usable_tokens(self, positions: int) -> int:
        """Longest text whose tokens, with those put in, fit `positions`."""
        if self.pooling != "mcls":
            return positions
        # L + (L - 1) // n <= P; whole groups of n take n + 1 positions
        groups, rest = divmod(positions, self.cls_every_tokens + 1)
        return groups * self.cls_every_tokens + rest


def turn_encoder(encoder: Mapping[str, Any], attention: Direction | None) -> dict[str, Any]:
    """The config.json `encoder` with the field of its family that makes it read in direction `attention`."""
    family = FAMILIES.get(str(encoder.get("model_type")))
    if attention is None or family is None or not family.direction_field:
        return dict(encoder)
    field = family.direction_field
    return {**encoder, field: (attention == "causal") == (field == "is_causal")}


def read_pooling(folder: Path) -> str | None:
    """The pooling a folder names, in its own megam3_config.json or in sentence-transformers' files; None when
    it names none. Both styles of the latter are read: `pooling_mode_cls_token: true` (before 5.7), and
    `pooling_mode: "cls"`.
    """
    if (folder / OWN_FILE).is_file() and "pooling" in (own := read_model_object(folder / OWN_FILE)):
        return str(own["pooling"])
    if not (folder / "modules.json").is_file():
        return None
    for module in _modules(folder):
        file = folder / module["path"] / "config.json"
        if module["type"].rsplit(".", 1)[-1] == "Pooling" and file.is_file():
            return _pooling_name(read_model_object(file))
    return None


def _modules(folder: Path) -> list[dict[str, str]]:
    """Parts of a sentence-transformers model, each with its `type` and the `path` of its folder."""
    file = folder / "modules.json"
    found = read_model_json(file)
    fields = ("path", "type")
    if not isinstance(found, list) or not all(
        isinstance(module, dict) and all(isinstance(module.get(name), str) for name in fields)
        for module in found
    ):
        rule = "must be a list of objects with `path` and `type`"
        raise ConfigError(str(file), type(found).__name__, rule, "restore the file from the model's source")
    return found


def _pooling_name(config: Mapping[str, Any]) -> str:
    modes = [config["pooling_mode"]] if "pooling_mode" in config else []
    if not modes:
        keys = [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
        modes = [key.removeprefix("pooling_mode_") for key in keys]
    names = [str(mode).removesuffix("_tokens").removesuffix("_token") for mode in modes]
    return (
        "+".join(_NAMES.get(name, _NAMES.get(str(mode), name)) for name, mode in zip(names, modes)) or "mean"
    )


def resolve_reading(
    folder: str,
    encoder: Mapping[str, Any],
    *,
    pooling: Pooling | None = None,
    cls_every_tokens: int | None = None,
    attention: Direction | None = None,
) -> Reading:
    """The reading of the model in `folder`, whose config.json is `encoder`; None: what the folder says.

    Raises:
        ConfigError: a pooling that does not exist here, or that makes no sense in the encoder's direction.
    """
    problem = find_direction_problem(str(encoder.get("model_type")), attention, folder)
    if problem is not None:
        raise problem
    causal = is_causal(turn_encoder(encoder, attention))
    named = read_pooling(Path(folder))
    chosen = pooling or named or ("last" if causal else "cls")
    if chosen not in POOLINGS:
        rule = f"{folder} pools its dense vector by {named!r}, which megam3 does not do"
        raise ConfigError("model.pooling", pooling, rule, f"choose one of {', '.join(POOLINGS)}")
    if causal and chosen in ("cls", "mcls"):
        rule = "the encoder reads left to right, where the first token sees itself alone"
        remedy = "use last or mean, or set model.attention: bidirectional"
        raise ConfigError("model.pooling", chosen, rule, remedy)
    if cls_every_tokens is not None and chosen != "mcls":
        rule = f"it says where mcls puts its tokens, and the pooling is {chosen}"
        raise ConfigError("model.cls_every_tokens", cls_every_tokens, rule, "leave it out")
    every = cls_every_tokens or _own_interval(Path(folder)) or CLS_EVERY_TOKENS
    return Reading(pooling=chosen, cls_every_tokens=every)  # type: ignore[arg-type]


def own_fields(reading: Reading) -> dict[str, object]:
    """What `megam3_config.json` says of a reading, so that `resolve_reading` of the folder gives it back."""
    if reading.pooling != "mcls":
        return {"pooling": reading.pooling}
    return {"pooling": reading.pooling, "cls_every_tokens": reading.cls_every_tokens}


def find_first_problem(reading: Reading, first_id: int | None, folder: str) -> ConfigError | None:
    """Why the dense vector cannot be read from the first token, or None; `first_id` is the special token that
    the tokenizer in `folder` puts there."""
    if first_id is not None or reading.pooling not in ("cls", "mcls"):
        return None
    rule = f"the tokenizer in {folder} puts no token of its own first: the first one is a word of the text"
    return ConfigError("model.pooling", reading.pooling, rule, "use last or mean")


def _own_interval(folder: Path) -> int | None:
    own = read_model_object(folder / OWN_FILE) if (folder / OWN_FILE).is_file() else {}
    return own.get("cls_every_tokens")
