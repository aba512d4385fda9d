import contextlib
import gzip
import json
import os

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megam3.data import source
from megam3.data.source import (
    ForwardReader,
    HugeLine,
    find_files,
    first_line,
    place,
    read_unit,
    split_file,
)
from megam3.errors import DataError
from tests.data.pairs import make_records, write_jsonl


def read_all(path, unit_bytes):
    """[(line number in the file, content)] read unit by unit."""
    return [
        (first_line(unit) + number, line)
        for unit in split_file(str(path), unit_bytes)
        for number, line in read_unit(unit)
    ]


def pack(path: str, text: bytes) -> None:
    """`text` as a compressed file of the kind its name says."""
    with gzip.open(path, "wb") if path.endswith("gz") else pa.output_stream(path, compression="zstd") as file:
        file.write(text)


@given(
    lines=st.lists(st.binary(max_size=12).map(lambda x: x.replace(b"\n", b"")), max_size=30),
    unit=st.integers(1, 40),
    end=st.booleans(),
)
def test_every_line_once_whatever_the_units(tmp_path_factory, lines, unit, end):
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    text = b"\n".join(lines) + (b"\n" if end else b"")
    path.write_bytes(text)
    wanted = [(number, line) for number, line in enumerate(text.split(b"\n")) if line.strip()]
    assert [(number, line.rstrip(b"\n")) for number, line in read_all(path, unit)] == wanted
    packed = tmp_path_factory.getbasetemp() / "lines.jsonl.gz"
    packed.write_bytes(gzip.compress(text))
    assert [(number, line.rstrip(b"\n")) for number, line in read_all(packed, unit)] == wanted


@pytest.mark.parametrize(
    "suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", "-stream.arrow"]
)
@pytest.mark.parametrize("unit_bytes", [700, 1 << 20])
def test_formats_give_the_same_records(tmp_path, suffix, unit_bytes):
    records = make_records(50)
    path, plain = tmp_path / f"d{suffix}", write_jsonl(tmp_path / "plain.jsonl", records)
    table = pa.Table.from_pylist(records)
    if suffix.endswith("gz"):
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif suffix.endswith("zst"):
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(plain.read_bytes())
    elif suffix == ".parquet":
        pa.parquet.write_table(table, path, row_group_size=7)
    elif suffix.endswith("arrow"):
        make = pa.ipc.new_stream if "stream" in suffix else pa.ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=7)
    else:
        path = plain
    found = read_all(path, unit_bytes)
    assert [number for number, _ in found] == list(range(50))
    assert [line if isinstance(line, dict) else json.loads(line) for _, line in found] == records
    if unit_bytes == 700:
        assert len(split_file(str(path), unit_bytes)) > 3


def test_files_directories_globs_in_order_and_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.parquet", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [
        os.path.relpath(path, tmp_path)
        for path in find_files([str(tmp_path / "b.*"), str(tmp_path), str(tmp_path / "b.jsonl")], "f")
    ]
    assert names == ["b.jsonl", "a.jsonl.gz", "sub/c.parquet"]


def test_missing_and_unknown_files(tmp_path):
    (tmp_path / "x.csv").touch()
    with pytest.raises(
        DataError, match=r"data.train\[d\].paths = .*none.jsonl.*: matches no data file; check the path"
    ):
        find_files([str(tmp_path / "none.jsonl")], "data.train[d].paths")
    with pytest.raises(DataError, match=r"x.csv.*: has no known format; use one of .jsonl"):
        find_files([str(tmp_path / "x.csv")], "data.train[d].paths")


@pytest.mark.parametrize("cut", [10, 200])
def test_truncated_gzip(tmp_path, cut):
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(write_jsonl(tmp_path / "p.jsonl", make_records(50)).read_bytes())[:-cut])
    with pytest.raises(
        DataError,
        match=r"data file = .*d.jsonl.gz.*: cannot be read to its end \(EOFError.*write or fetch it again",
    ):
        split_file(str(path), 1 << 20)


@pytest.mark.parametrize("name", ["d.jsonl.zst", "d.parquet", "d.arrow", "d.jsonl.gz"])
def test_damaged_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"no such format at all")
    with pytest.raises(DataError, match=rf"data file = .*{name}.*: cannot be read to its end"):
        list(split_file(str(tmp_path / name), 1 << 20))


def test_truncated_zstd(tmp_path):
    path = tmp_path / "d.jsonl.zst"
    with pa.output_stream(str(path), compression="zstd") as stream:
        stream.write(os.urandom(100_000))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"d.jsonl.zst.*cannot be read to its end"):
        split_file(str(path), 1 << 20)


def test_unreadable_file(tmp_path):
    path = tmp_path / "d.jsonl"
    path.symlink_to("/proc/self/mem")  # opens, but reading fails, for root too
    with pytest.raises(
        DataError,
        match=r"data file = .*d.jsonl.*: cannot be read to its end \(OSError.*check its permissions",
    ):
        list(read_unit(source.Unit(str(path), "jsonl", 0, 100)))


def test_huge_line_is_passed_over_without_holding_it(tmp_path, monkeypatch):
    monkeypatch.setattr(source, "MAX_LINE_BYTES", 1000)
    path = write_jsonl(tmp_path / "d.jsonl", [b"a", b"x" * 5000, b"b"])
    lines = [line for _, line in read_all(path, 1 << 20)]
    assert [line for line in lines if isinstance(line, bytes)] == [b"a\n", b"b\n"]
    assert isinstance(lines[1], HugeLine)
    assert lines[1].num_bytes == 5001
    assert [number for number, _ in read_all(path, 2000)] == [0, 1, 2]


def test_place_counts_lines_from_one(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [b"a", b"b", b"c"])
    units = split_file(str(path), 3)
    assert [place(unit, number) for unit in units for number, _ in read_unit(unit)] == [
        f"{path}:{line}" for line in (1, 2, 3)
    ]


def squeeze(path, text):
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text))
    else:
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(text)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_a_file_that_opens_to_far_more_than_its_size_is_refused(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"bomb{suffix}"
    squeeze(path, b" " * (3 << 20))
    assert split_file(str(path), 64 << 20)  # small enough to be read all the same
    monkeypatch.setattr(source, "SMALL_TEXT_BYTES", 1 << 20)
    with pytest.raises(
        DataError, match=r"bomb.*: its \d+ bytes open to more than 1048576, which text does not; look into it"
    ):
        split_file(str(path), 64 << 20)


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_ordinary_records_do_not_look_like_a_bomb(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(source, "SMALL_TEXT_BYTES", 0)
    plain = write_jsonl(tmp_path / "plain.jsonl", make_records(2000))
    path = tmp_path / f"d{suffix}"
    squeeze(path, plain.read_bytes())
    assert split_file(str(path), 1 << 30)[-1].stop == plain.stat().st_size


def count_rows(path) -> int:
    return sum(1 for unit in split_file(str(path), 64 << 20) for _ in read_unit(unit))


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_parquet_file_that_opens_to_far_more_than_its_size_is_refused_in_bounded_memory(
    tmp_path, dictionary, monkeypatch
):
    path = tmp_path / "bomb.parquet"
    value = "".join(map(chr, range(97, 123))) * 20_000  # half a megabyte, 200 times
    table = pa.table({"text": pa.array([value] * 200)})
    pq.write_table(table, path, use_dictionary=dictionary, compression="zstd", data_page_size=1 << 20)
    assert path.stat().st_size < 100_000
    monkeypatch.setattr(source, "SMALL_TEXT_BYTES", 1 << 20)
    monkeypatch.setattr(source, "MAX_SLICE_BYTES", 20 << 20)
    slices = []
    batches = pq.ParquetFile.iter_batches

    def counted(self, *args, **options):
        for batch in batches(self, *args, **options):
            slices.append(batch.nbytes)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    with pytest.raises(DataError, match=r"bomb.parquet.*bytes open to more than \d+, which text does not"):
        count_rows(path)
    assert sum(slices) < 30 << 20


def test_ordinary_parquet_is_read_in_large_slices_whatever_its_dictionaries(tmp_path):
    records = [{"text": f"text {number}", "language": "de"} for number in range(5000)]
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist(records), path)
    (unit,) = split_file(str(path), 64 << 20)
    assert [row for _, row in read_unit(unit)] == records


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_units_of_a_compressed_file_are_read_in_one_pass(tmp_path, suffix, monkeypatch):
    """Any cut, gaps included: the lines are those of a file opened for each unit."""
    lines = [json.dumps({"text": "x" * (17 * i % 400)}).encode() + b"\n" for i in range(300)]
    path = str(tmp_path / f"d{suffix}")
    pack(path, b"".join(lines))
    opened = []
    original = source._open_text

    def open_text(*arguments):
        opened.append(arguments)
        return original(*arguments)

    for unit_bytes in (50, 1000, 7000):
        units = split_file(path, unit_bytes)
        alone = [list(read_unit(unit)) for unit in units]
        assert [line for unit in alone for _, line in unit] == lines
        for step in (1, 2, 5):
            with monkeypatch.context() as patch, contextlib.closing(ForwardReader()) as reader:
                patch.setattr(source, "_open_text", open_text)
                opened.clear()
                assert [list(read_unit(unit, reader)) for unit in units[::step]] == alone[::step]
            assert len(opened) == 1
        # any other order is right as well
        with contextlib.closing(ForwardReader()) as reader:
            assert [list(read_unit(unit, reader)) for unit in units[::-1]] == alone[::-1]


def test_a_reader_given_up_in_the_middle_of_a_unit_starts_anew(tmp_path):
    path = str(tmp_path / "d.jsonl.gz")
    pack(path, b"".join(b'{"text": "%d"}\n' % i for i in range(100)))
    units = split_file(path, 300)
    with contextlib.closing(ForwardReader()) as reader:
        given_up = read_unit(units[0], reader)
        next(given_up)
        given_up.close()
        assert list(read_unit(units[1], reader)) == list(read_unit(units[1]))
