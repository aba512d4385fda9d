"""Lines of input files as JSON objects, and the passages they name, one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

from megam3.data.record import BadRecord, Record, parse_record, short
from megam3.data.source import ForwardReader, HugeLine, Unit, find_files, place, read_unit, split_file
from megam3.errors import DataError
from megam3.files import parse_json

READ_UNIT_BYTES = 64 << 20
_CORRECT = "correct the record, or take it out"


def read_objects(unit: Unit, reader: ForwardReader | None = None) -> Iterator[tuple[int, dict]]:
    """(number within the unit, object) of each record. Whoever reads several units of a file gives the same
    `reader` to each call, here and in what follows.

    Raises:
        DataError: a line that is no JSON object, with `file:line`.
    """
    for number, line in read_unit(unit, reader):
        if isinstance(line, dict):
            yield number, line
            continue
        try:
            parsed = None if isinstance(line, HugeLine) else parse_json(line)
        except ValueError as error:
            shown = short(line.decode("utf-8", "replace") if isinstance(line, bytes) else line)
            rule = f"is not valid JSON ({error})"
            raise DataError(place(unit, number), shown, rule, _CORRECT) from error
        if not isinstance(parsed, dict):
            raise DataError(place(unit, number), short(parsed), "must be a JSON object", _CORRECT)
        yield number, parsed


def read_pairs(unit: Unit, reader: ForwardReader | None = None) -> Iterator[tuple[dict, Record]]:
    """(object as written, checked record) of each training record; a record without a query is refused.

    Raises:
        DataError: a record that breaks a rule of `parse_record`, with `file:line`.
    """
    for number, parsed in read_objects(unit, reader):
        record = _checked(unit, number, parsed)
        if record.query is None:
            raise DataError(
                place(unit, number),
                short(parsed),
                "must hold a query and its positives",
                'give training records: {"query": …, "pos": […]}; texts alone belong to --corpus',
            )
        yield parsed, record


def _checked(unit: Unit, number: int, parsed: dict) -> Record:
    try:
        return parse_record(parsed)
    except BadRecord as why:
        raise DataError(f"{place(unit, number)} {why.field}", short(why.value), why.rule, _CORRECT) from why


def read_passages(unit: Unit, reader: ForwardReader | None = None) -> Iterator[str]:
    """Texts of passages: `text` after its `title` (BEIR's corpus.jsonl, `{"text"}`), or pos and neg of a
    training record.

    Texts that are empty come as empty strings; BEIR's corpora hold some.

    Raises:
        DataError: a record of neither form, with `file:line`.
    """
    for number, parsed in read_objects(unit, reader):
        if "query" in parsed:
            yield from _checked(unit, number, parsed).passages
        elif isinstance(parsed.get("text"), str) and isinstance(parsed.get("title") or "", str):
            yield f"{parsed.get('title') or ''} {parsed['text']}".strip()
        else:
            rule = "must hold a string under `text`, or `query` and `pos`"
            raise DataError(place(unit, number), short(parsed), rule, _CORRECT)


def pairs_of(files: Iterable[str]) -> Iterator[Record]:
    """Records of whole files, each file read once; see `read_pairs`."""
    with closing(ForwardReader()) as reader:
        for unit in units_of(files):
            yield from (record for _, record in read_pairs(unit, reader))


def passages_of(files: Iterable[str]) -> Iterator[str]:
    """Texts of whole files, each file read once; see `read_passages`."""
    with closing(ForwardReader()) as reader:
        for unit in units_of(files):
            yield from read_passages(unit, reader)


def units_of(files: Iterable[str], unit_bytes: int = READ_UNIT_BYTES) -> list[Unit]:
    """All files cut into units, in order."""
    return [unit for file in files for unit in split_file(file, unit_bytes)]


def corpus_files(paths: Iterable[str], field: str) -> list[str]:
    """Files of a corpus; of a folder in BEIR format corpus.jsonl alone, since its queries are no passages.

    Raises:
        DataError: nothing there, or a file of no known format.
    """
    narrowed = [str(Path(p, "corpus.jsonl")) if Path(p, "corpus.jsonl").is_file() else p for p in paths]
    return find_files(narrowed, field)
