"""Input files, cut into units that can be prepared independently.

A unit is a span of one file: bytes of (decompressed) text for JSONL, row groups for Parquet, record batches
for Arrow. A line belongs to the unit in which it STARTS, so the cut depends on the file alone, never on how
many processes read it:

    bytes   0              64 MiB            128 MiB
            |line|line|li  ne|line|line|line  |line|
            `---- unit 0 ----´`--- unit 1 ---´
"""

from __future__ import annotations

import glob
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from megam3.errors import DataError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".jsonl.gz": "jsonl.gz",
    ".json.gz": "jsonl.gz",
    ".jsonl.zst": "jsonl.zst",
    ".json.zst": "jsonl.zst",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
MAX_LINE_BYTES = 32 << 20
"""A longer line is refused unread: no record of 8192-token passages comes near it."""
MAX_EXPANSION = 200
"""Compressed text that opens to more than this many times its size is no text: records shrink to a
third or a tenth, gzip packs up to 1000 equal bytes into one, zstd more."""
SMALL_TEXT_BYTES = 64 << 20
"""Up to here no file is refused: a few hundred equal lines are a fair test of somebody's."""
READ_BYTES = 1 << 20
ROWS_PER_SLICE = 512
MAX_SLICE_BYTES = 1 << 30
"""What the rows of one slice may open to in memory at the worst."""


class Unit(NamedTuple):
    """Span `start` … `stop`-1 of one file, in bytes of text, row groups or record batches."""

    path: str
    format: str
    start: int
    stop: int


@dataclass(frozen=True)
class HugeLine:
    """Stands in for a line of more than MAX_LINE_BYTES: its beginning and its size."""

    head: bytes
    num_bytes: int


class ForwardReader:
    """Keeps a compressed file open between two of its units: opening it again would unpack all that lies
    before the second one, which for the last of a thousand units is nearly the whole file.

    Units of a file that come in order, also with gaps, cost one pass together; any other order is right and
    slow. Close it at the end.
    """

    def __init__(self) -> None:
        self._stream: IO[bytes] | None = None
        self._path = ""
        self._stop = self._position = 0

    def start(self, unit: Unit) -> tuple[IO[bytes], int]:
        """A stream that stands at the first line of `unit`, and where that is in the text."""
        stream, self._stream = self._stream, None
        if stream is not None and self._path == unit.path and self._stop <= unit.start:
            # it stands behind a line that began before `_stop`; if that line reached into this unit or over
            # its start, the next line is this unit's first
            if self._position >= unit.start:
                return stream, self._position
            _skip(stream, unit.start - 1 - self._position, seekable=False)
            return stream, unit.start - 1 + _next_line(stream)[1]
        if stream is not None:
            stream.close()
        return _open_at(unit)

    def keep(self, unit: Unit, stream: IO[bytes], position: int) -> None:
        """`unit` was read to its end, and `stream` stands at the line after it."""
        self._stream, self._path, self._stop, self._position = stream, unit.path, unit.stop, position

    def close(self) -> None:
        """Close what is open."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None


def find_files(patterns: list[str], field: str, outside: Path | None = None) -> list[str]:
    """Files named by paths, directories (searched recursively) and globs, in a fixed order, each once.

    `field` names them in errors.

    Directories are searched but for the folder `outside`: a store may lie beside its data, and its shards are
    no input.

    Raises:
        DataError: nothing matches a pattern, or a named file is of no known format.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            matches = sorted(
                str(p)
                for p in path.rglob("*")
                if p.is_file() and format_of(str(p)) and not _inside(p, outside)
            )
        else:
            matches = (
                [pattern]
                if path.is_file()
                else sorted(p for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
            )
        if not matches:
            raise DataError(
                field,
                pattern,
                "matches no data file",
                "check the path; relative paths start at the working directory",
            )
        for match in matches:
            if format_of(match) is None:
                raise DataError(field, match, "has no known format", f"use one of {', '.join(SUFFIXES)}")
            found[match] = None
    return list(found)


def _inside(path: Path, folder: Path | None) -> bool:
    return folder is not None and path.resolve().is_relative_to(folder.resolve())


def format_of(path: str) -> str | None:
    """Format by file name; None when it is none of ours."""
    return next(
        (
            name
            for suffix, name in sorted(SUFFIXES.items(), key=lambda x: -len(x[0]))
            if path.endswith(suffix)
        ),
        None,
    )


def split_file(path: str, unit_bytes: int, start: int = 0) -> list[Unit]:
    """Cut one file into units of about `unit_bytes` of text; compressed text is read once to learn its size.
    JSONL may be cut from byte `start` of its text on.

    Raises:
        DataError: the file cannot be read to its end.
    """
    file_format = format_of(path)
    assert file_format is not None, path
    with reading(path):
        if file_format.startswith("jsonl"):
            size = Path(path).stat().st_size if file_format == "jsonl" else _text_size(path, file_format)
            return [
                Unit(path, file_format, begin, min(begin + unit_bytes, size))
                for begin in range(start, size, unit_bytes)
            ]
        return [Unit(path, file_format, *span) for span in _group(_part_sizes(path, file_format), unit_bytes)]


def read_unit(
    unit: Unit, reader: ForwardReader | None = None
) -> Iterator[tuple[int, bytes | dict | HugeLine]]:
    """Yield (number within the unit, line or decoded row) of each non-blank record.

    Whoever reads several units of a file gives the same `reader` to each call.

    Raises:
        DataError: the file cannot be read.
    """
    with reading(unit.path):
        yield from _read_lines(unit, reader) if unit.format.startswith("jsonl") else _read_rows(unit)


def first_line(unit: Unit) -> int:
    """Lines (or rows) of the file before the unit's first one. Reads up to there: for error messages only."""
    if not unit.format.startswith("jsonl"):
        return sum(_part_rows(unit.path, unit.format)[: unit.start])
    if unit.start == 0:
        return 0
    left, lines = unit.start - 1, 0
    with _open_text(unit.path, unit.format) as stream:
        while left > 0 and (block := stream.read(min(READ_BYTES, left))):
            lines, left = lines + block.count(b"\n"), left - len(block)
    return lines + 1


def place(unit: Unit, number: int) -> str:
    """`file:line` of record `number` of the unit, counted from 1."""
    return f"{unit.path}:{first_line(unit) + number + 1}"


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn whatever a damaged or unreadable file raises into a DataError that names it."""
    try:
        yield
    except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
        rule = f"cannot be read to its end ({type(error).__name__}: {error})"
        raise DataError(
            "data file", path, rule, "check its permissions, or write or fetch it again"
        ) from error


def _open_text(path: str, file_format: str) -> IO[bytes]:
    if file_format == "jsonl.gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if file_format == "jsonl.zst":
        return io.BufferedReader(pa.input_stream(path, compression="zstd"), READ_BYTES)
    return open(path, "rb", buffering=READ_BYTES)


def _text_size(path: str, file_format: str) -> int:
    packed_bytes, num_bytes = Path(path).stat().st_size, 0
    limit = max(SMALL_TEXT_BYTES, MAX_EXPANSION * packed_bytes)
    with _open_text(path, file_format) as stream:
        while block := stream.read(READ_BYTES):
            num_bytes += len(block)
            if num_bytes > limit:
                raise _bomb(path, packed_bytes, limit)
    return num_bytes


def _skip(stream: IO[bytes], num_bytes: int, seekable: bool) -> None:
    if seekable:
        stream.seek(num_bytes)
        return
    while num_bytes > 0 and (block := stream.read(min(READ_BYTES, num_bytes))):
        num_bytes -= len(block)


def _next_line(stream: IO[bytes]) -> tuple[bytes | HugeLine, int]:
    line = stream.readline(MAX_LINE_BYTES + 1)
    if len(line) <= MAX_LINE_BYTES:
        return line, len(line)
    num_bytes, more = len(line), line
    while more and not more.endswith(b"\n"):
        more = stream.readline(READ_BYTES)
        num_bytes += len(more)
    return HugeLine(line[:1024], num_bytes), num_bytes


def _open_at(unit: Unit) -> tuple[IO[bytes], int]:
    """The file, opened anew, at the unit's first line; and where that is in the text."""
    stream = _open_text(unit.path, unit.format)
    if unit.start == 0:
        return stream, 0
    try:
        _skip(stream, unit.start - 1, seekable=unit.format == "jsonl")
        return stream, unit.start - 1 + _next_line(stream)[1]
    except BaseException:
        stream.close()
        raise


def _read_lines(unit: Unit, reader: ForwardReader | None) -> Iterator[tuple[int, bytes | HugeLine]]:
    if unit.format == "jsonl":
        reader = None  # can be opened anywhere
    stream, position = reader.start(unit) if reader else _open_at(unit)
    is_kept = False
    try:
        number = 0
        while position < unit.stop:
            line, num_bytes = _next_line(stream)
            if not num_bytes:
                break
            position += num_bytes
            if isinstance(line, HugeLine) or line.strip():
                yield number, line
            number += 1
        if reader:
            reader.keep(unit, stream, position)
            is_kept = True
    finally:
        if not is_kept:
            stream.close()


def _group(sizes: list[int], limit: int) -> list[tuple[int, int]]:
    """Consecutive parts joined into spans of at least `limit` bytes, the last one excepted."""
    spans, start, total = [], 0, 0
    for index, size in enumerate(sizes):
        total += size
        if total >= limit or index == len(sizes) - 1:
            spans.append((start, index + 1))
            start, total = index + 1, 0
    return spans


def _arrow_batches(path: str) -> Iterator[pa.RecordBatch]:
    source = pa.memory_map(path)
    try:
        reader = pa.ipc.open_file(source)
    except pa.ArrowInvalid:  # the streaming form, which the `datasets` library writes under the same suffix
        source.seek(0)
        yield from pa.ipc.open_stream(source)
        return
    for index in range(reader.num_record_batches):
        yield reader.get_batch(index)


def _part_sizes(path: str, file_format: str) -> list[int]:
    if file_format == "parquet":
        metadata = pa.parquet.ParquetFile(path).metadata
        sizes = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
        packed_bytes = Path(path).stat().st_size
        limit = max(SMALL_TEXT_BYTES, MAX_EXPANSION * packed_bytes)
        if sum(sizes) > limit:
            raise _bomb(path, packed_bytes, limit)
        return sizes
    return [batch.nbytes for batch in _arrow_batches(path)]


def _part_rows(path: str, file_format: str) -> list[int]:
    if file_format == "parquet":
        metadata = pa.parquet.ParquetFile(path).metadata
        return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    return [batch.num_rows for batch in _arrow_batches(path)]


def _parquet_batches(unit: Unit) -> Iterator[pa.RecordBatch]:
    """Slices of row groups, bounded in memory before they are read.

    A dictionary stores a value once for all the rows that hold it: 198 KB were seen to open to 6 GB. The
    sizes in the footer say what one row can be at most, and what has been opened so far is counted.
    """
    file, packed_bytes, num_bytes = pa.parquet.ParquetFile(unit.path), Path(unit.path).stat().st_size, 0
    groups = [file.metadata.row_group(number) for number in range(unit.start, unit.stop)]
    columns = [group.column(number) for group in groups for number in range(group.num_columns)]
    largest = max((column.total_uncompressed_size for column in columns), default=0)
    # few rows at a time cost about 3 us a row, which tokenising hides
    num_rows = ROWS_PER_SLICE if largest * ROWS_PER_SLICE <= MAX_SLICE_BYTES else ROWS_PER_SLICE // 32
    limit = max(SMALL_TEXT_BYTES, MAX_EXPANSION * packed_bytes)
    for batch in file.iter_batches(num_rows, row_groups=list(range(unit.start, unit.stop))):
        num_bytes += batch.nbytes
        if num_bytes > limit:
            raise _bomb(unit.path, packed_bytes, limit)
        yield batch


def _bomb(path: str, packed_bytes: int, limit: int) -> DataError:
    rule = f"its {packed_bytes} bytes open to more than {limit}, which text does not"
    return DataError("data file", path, rule, "look into it; if it is right, give it uncompressed")


def _read_rows(unit: Unit) -> Iterator[tuple[int, dict]]:
    if unit.format == "parquet":
        batches = _parquet_batches(unit)
    else:
        batches = (batch for i, batch in enumerate(_arrow_batches(unit.path)) if unit.start <= i < unit.stop)
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_SLICE):
            for row in batch.slice(start, ROWS_PER_SLICE).to_pylist():
                yield number, row
                number += 1
