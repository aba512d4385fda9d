"""One record: what a line of training data must look like, and why a bad one was refused.

Two forms, told apart by their keys (FlagEmbedding's names; `lang` and `id` are optional additions):

    {"query": "…", "pos": ["…"], "neg": ["…"], "pos_scores": [0.9], "neg_scores": [0.1], "prompt": "…",
     "type": "normal", "lang": "de", "id": "7"}
    {"text": "…", "lang": "de", "id": "7"}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megam3.errors import DataError
from megam3.files import parse_json

RECORD_TYPES = ("normal", "only_1neg", "symmetric_sts", "symmetric_clustering", "symmetric_class")
"""FlagEmbedding's values of `type`: `only_1neg` limits a group to one negative; passages of
`symmetric_sts` and `symmetric_clustering` are queries too and get the query's instruction; the others are
labels."""
PAIR_KEYS = ("query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type", "lang", "id")
TEXT_KEYS = ("text", "lang", "id")
"""Keys that are read; any other is counted and said, since it may be a mistyped one of these."""
MAX_SCORE = 3.4e38
MAX_PASSAGES = 65535
MAX_TEXT_CHARACTERS = 1 << 22
"""Longer than War and Peace. The tokenizer holds about 105 bytes a character before it truncates: 0.4 GB of
this, 1.7 GB of four times as many (docs/experiments.md)."""


class BadRecord(Exception):  # noqa: N818 - becomes a DataError once file and line are known
    """Why one record was refused: the offending `field`, its `value` and the `rule` it breaks."""

    def __init__(self, field: str, value: object, rule: str):
        self.field, self.value, self.rule = field, value, rule
        super().__init__(f"{field} = {short(value)!r}: {rule}")

    def at(self, place: str) -> DataError:
        """The same as an error for the user; `place` is `file:line`."""
        remedy = "correct the record, or set data.on_bad_record: skip to leave such records out"
        return DataError(f"{place} {self.field}", short(self.value), self.rule, remedy)


@dataclass(frozen=True, kw_only=True)
class Record:
    """A checked record. A text for pretraining has `query` None and one passage, its text."""

    query: str | None
    passages: tuple[str, ...]
    """Positives, then negatives."""
    num_positives: int
    scores: tuple[float, ...] = ()
    """Teacher scores, one per passage, or none."""
    prompt: str | None = None
    """Takes the place of the dataset's query instruction."""
    only_one_negative: bool = False
    passages_are_queries: bool = False
    language: str | None = None
    record_id: str | None = None
    unknown_keys: tuple[str, ...] = ()
    """Keys of the record that hold something and are not read."""


def parse_line(line: bytes) -> Record:
    """Check one JSON line.

    Raises:
        BadRecord: invalid UTF-8 or JSON, or any rule of `parse_record`.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord("line", line[:40], f"is not valid UTF-8 at byte {error.start}") from error
    try:
        parsed = parse_json(text)
    except ValueError as error:  # bad JSON, or a number of thousands of digits
        raise BadRecord("line", text, f"is not valid JSON ({error})") from error
    return parse_record(parsed)


def parse_record(parsed: object) -> Record:
    """Check one decoded record (a JSON object, or a row of a Parquet or Arrow file).

    Raises:
        BadRecord: not an object, a missing or mistyped key, an empty query or passage, no positive, or
            teacher scores that are not one finite number per passage.
    """
    if not isinstance(parsed, dict):
        raise BadRecord("record", parsed, "must be a JSON object")
    language, record_id = _text_or_none(parsed, "lang"), _id_or_none(parsed)
    if "text" in parsed and "query" not in parsed:
        text, unknown = _required_text(parsed, "text"), _unknown_keys(parsed, TEXT_KEYS)
        return Record(
            query=None,
            passages=(text,),
            num_positives=0,
            language=language,
            record_id=record_id,
            unknown_keys=unknown,
        )
    if "query" not in parsed:
        raise BadRecord("keys", sorted(str(key) for key in parsed), "must hold `query` and `pos`, or `text`")
    query = _required_text(parsed, "query")
    positives, negatives = _texts(parsed, "pos"), _texts(parsed, "neg")
    if not positives:
        raise BadRecord("pos", parsed.get("pos"), "must hold at least one passage")
    if len(positives) + len(negatives) > MAX_PASSAGES:
        raise BadRecord("neg", len(negatives), f"makes more than {MAX_PASSAGES} passages")
    kind = _text_or_none(parsed, "type") or "normal"
    if kind not in RECORD_TYPES:
        raise BadRecord("type", kind, f"must be one of {', '.join(RECORD_TYPES)}")
    scores = _scores(parsed, len(positives), len(negatives))
    prompt = _text_or_none(parsed, "prompt") or None
    passages = positives + negatives
    symmetric = kind in ("symmetric_sts", "symmetric_clustering")
    return Record(
        query=query,
        passages=passages,
        num_positives=len(positives),
        scores=scores,
        prompt=prompt,
        only_one_negative=kind == "only_1neg",
        passages_are_queries=symmetric,
        language=language,
        record_id=record_id,
        unknown_keys=_unknown_keys(parsed, PAIR_KEYS),
    )


def _unknown_keys(parsed: dict, known: Sequence[str]) -> tuple[str, ...]:
    # a table has every column in every row: what holds nothing was not meant
    return tuple(str(key) for key, value in parsed.items() if key not in known and value is not None)


def _required_text(parsed: dict, key: str) -> str:
    value = parsed[key]
    if not isinstance(value, str):
        raise BadRecord(key, value, "must be a string")
    if not value.strip():
        raise BadRecord(key, value, "must not be empty")
    return _encodable(key, value)


def _encodable(key: str, value: str) -> str:
    if len(value) > MAX_TEXT_CHARACTERS:
        rule = f"has {len(value)} characters, more than the {MAX_TEXT_CHARACTERS} of any text; cut it up"
        raise BadRecord(key, value, rule)
    # "\ud800" is valid JSON but no text: half of a surrogate pair
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadRecord(
            key, value.encode("utf-8", "backslashreplace").decode(), "holds half of a surrogate pair"
        ) from error
    return value


def _text_or_none(parsed: dict, key: str) -> str | None:
    value = parsed.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRecord(key, value, "must be a string")
    return None if value is None else _encodable(key, value)


def _id_or_none(parsed: dict) -> str | None:
    value = parsed.get("id")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRecord("id", value, "must be a string or an integer")
    return _encodable("id", str(value))


def _texts(parsed: dict, key: str) -> tuple[str, ...]:
    value = parsed.get(key)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise BadRecord(key, value, "must be a list of strings")
    for index, item in enumerate(value):
        if not isinstance(item, str):
            raise BadRecord(f"{key}[{index}]", item, "must be a string")
        if not item.strip():
            raise BadRecord(f"{key}[{index}]", item, "must not be empty")
        _encodable(f"{key}[{index}]", item)
    return tuple(value)


def _scores(parsed: dict, num_positives: int, num_negatives: int) -> tuple[float, ...]:
    if parsed.get("pos_scores") is None and parsed.get("neg_scores") is None:
        return ()
    joined: list[float] = []
    for key, count in (("pos_scores", num_positives), ("neg_scores", num_negatives)):
        values = parsed.get(key)
        if values is None and count == 0:
            continue
        if not isinstance(values, list) or len(values) != count:
            raise BadRecord(key, values, f"must hold {count} teacher scores, one for each of `{key[:3]}`")
        joined += _finite(key, values)
    return tuple(joined)


def _finite(key: str, values: Sequence[object]) -> list[float]:
    for index, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRecord(f"{key}[{index}]", value, "must be a number")
        if not -MAX_SCORE <= value <= MAX_SCORE:
            raise BadRecord(f"{key}[{index}]", value, "must be finite (in float32)")
    return [float(value) for value in values]  # type: ignore[arg-type]


def short(value: object, limit: int = 80) -> object:
    """`value`, with long text cut so that an error stays one readable line."""
    text = value if isinstance(value, str) else repr(value)
    return value if len(text) <= limit else text[: limit - 1] + "…"
