"""The JSON documents of a store.

    spec.json           StoreSpec       what the shards are made from; written first
    shards/00000.json   ShardSummary    one per unit; its presence means that the shard is complete
    manifest.json       Manifest        written last; its presence means that the dataset is complete

Field names are the keys on disk.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict

from megam3.data.shard import INDEX_FIELDS, write_checked
from megam3.data.source import Unit
from megam3.errors import DataError
from megam3.files import parse_json

FORMAT = 1
INDEX_DTYPE = np.dtype([(name, "<u2") for name in INDEX_FIELDS])
RUN_DTYPE = np.dtype(
    [("first_row", "<i8"), ("num_rows", "<i8"), ("tokens", "<i8"), ("language", "<u2"), ("longest", "<u2")]
)


_Document = TypeVar("_Document", bound="Document")
"""typing.Self came with Python 3.11."""


class Document(BaseModel):
    """A typed JSON file, or a part of one. What is None is left out on disk."""

    model_config = ConfigDict(frozen=True)

    def to_json(self, indent: int | None = None) -> bytes:
        """Its bytes on disk; equal documents give equal bytes."""
        return json.dumps(
            self.model_dump(mode="json", exclude_none=True), sort_keys=True, indent=indent
        ).encode()

    @classmethod
    def read(cls: type[_Document], path: Path) -> _Document | None:
        """The document in a file, or None when it is not there.

        Raises:
            DataError: it is there but cannot be read, or is of another format.
        """
        try:
            found: Any = parse_json(path.read_bytes())
            if isinstance(found, dict) and found.get("format", FORMAT) != FORMAT:
                rule = f"this version reads format {FORMAT} ({path})"
                raise DataError("store format", found["format"], rule, "prepare the data again")
            return cls.model_validate(found)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except DataError:
            raise
        except (OSError, ValueError) as error:
            rule = f"cannot be read ({error})"
            what = "it" if path.name == "manifest.json" else "the dataset's folder"
            remedy = f"delete {what} and run `megam3 prepare` again"
            raise DataError("store file", str(path), rule, remedy) from error


class InputFile(NamedTuple):
    """What an input looked like when its dataset was begun."""

    num_bytes: int
    modified_ns: int


class RowRun(NamedTuple):
    """Neighbouring rows of a shard of equal language and tokens of the longest text."""

    language: str
    longest: int
    num_rows: int
    tokens: int


class TextRules(Document):
    """What turns a record into token ids; all of it is part of the store's fingerprint."""

    language: str
    query_instruction: str
    passage_instruction: str
    query_max_tokens: int
    passage_max_tokens: int


class StoreSpec(TextRules):
    """What a dataset's shards are made from."""

    format: int = FORMAT
    tokenizer: str
    """The tokenizer's fingerprint."""
    inputs: dict[str, InputFile]
    unit_bytes: int
    units: list[Unit]

    def rules(self) -> TextRules:
        """The part that a worker needs."""
        return TextRules(**{name: getattr(self, name) for name in TextRules.model_fields})


class FirstRecords(Document):
    """The first record of each kind, for messages: its line within the unit. Which line of the file that is,
    only a message asks: to know it for every unit would read the file once per unit.

    (Stores begun before that hold `file:line`.)
    """

    pair: int | str | None = None
    text: int | str | None = None
    pair_without_scores: int | str | None = None


class ShardSummary(Document):
    """What is known of a complete shard without opening it."""

    unit: Unit
    rows: int
    texts: int
    tokens: int
    truncated: int
    """Texts cut at their limit."""
    with_ids: int
    with_scores: int
    first: FirstRecords
    input_digest: str
    rejected: int
    reasons: dict[str, int]
    unknown_keys: dict[str, int] = {}
    """Rows that hold a key that is not read, by key."""
    runs: list[RowRun]
    bytes: int
    checksum: str


class ShardEntry(Document):
    """One shard in the manifest."""

    file: str
    rows: int
    bytes: int
    checksum: str
    input_digest: str


class Totals(Document):
    """Sums over all shards."""

    rows: int
    texts: int
    tokens: int
    truncated: int
    rejected: int
    with_ids: int
    with_scores: int
    bytes: int
    reasons: dict[str, int]
    unknown_keys: dict[str, int] = {}
    """Rows that hold a key that is not read, by key; empty too in stores from before they were counted."""


class LanguageTotals(Document):
    """Sums over one language."""

    rows: int
    tokens: int


class HistogramBar(NamedTuple):
    """Rows whose longest text has at most `edge` tokens and more than the edge before."""

    edge: int
    num_rows: int


class Manifest(Document):
    """A finished dataset."""

    format: int = FORMAT
    name: str
    kind: Literal["pair", "text"]
    spec: StoreSpec
    languages: list[str]
    """By the codes used in runs.npy."""
    shards: list[ShardEntry]
    totals: Totals
    per_language: dict[str, LanguageTotals]
    length_histogram: list[HistogramBar]
    fingerprint: str
    index_checksum: str | None = None
    """Of index.npy; None in stores from before it was kept, like the next two."""
    runs_checksum: str | None = None
    """Of runs.npy."""
    checksum: str | None = None
    """Of all the other fields."""

    def own_checksum(self) -> str:
        """What `checksum` must be."""
        others = self.model_copy(update={"checksum": None}).to_json()
        return hashlib.blake2b(others, digest_size=16).hexdigest()

    def with_spec(self, spec: StoreSpec) -> Manifest:
        """The same dataset, whose inputs are elsewhere now."""
        return self.model_copy(update={"spec": spec}).sealed()

    def sealed(self) -> Manifest:
        """With its checksum."""
        return self.model_copy(update={"checksum": self.own_checksum()})

    def write(self, folder: Path) -> None:
        """As `folder/manifest.json`: from now on the dataset is complete."""
        write_checked(folder / "manifest.json", [self.to_json(indent=1)])

    @classmethod
    def read(cls, path: Path) -> Manifest | None:
        """See `Document.read`; a manifest that changed after it was written is refused as well."""
        found = super().read(path)
        if found is not None and found.checksum not in (None, found.own_checksum()):
            rule = "was changed after it was written"
            remedy = "delete it and run `megam3 prepare` again: it is made anew from the shards"
            raise DataError("store file", str(path), rule, remedy)
        return found
