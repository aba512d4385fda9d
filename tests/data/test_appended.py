"""Data that grew: only what is new is prepared, and what is mended need not be prepared anew."""

import json
import logging
from pathlib import Path

import pytest

from megam3.data import prepare as preparing
from megam3.data.dataset import open_training_data
from megam3.data.encode import build_shard
from megam3.data.prepare import prepare_data
from megam3.data.store import open_dataset
from megam3.errors import DataError
from tests.data.pairs import data_config, make_records, write_jsonl

UNIT_BYTES = 3000


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """Names of the shards that were made."""
    names: list[str] = []

    def build(job, *arguments):
        names.append(job.name)
        return build_shard(job, *arguments)

    monkeypatch.setattr(preparing, "build_shard", build)
    return names


def prepare(paths: Path | list[Path], tokenizer, store: Path, **fields) -> list:
    return prepare_data(data_config(paths, **fields), tokenizer, store, unit_bytes=UNIT_BYTES)


def rows_of(store: Path) -> list[tuple]:
    """Every row of dataset d, in no order that the cut into units decides."""
    dataset = open_dataset(store, "d")
    rows = (dataset.row(number) for number in range(dataset.num_rows))
    return sorted((row.tokens.tolist(), row.offsets.tolist(), row.num_positives) for row in rows)


def append(path: Path, records: list) -> None:
    path.write_bytes(path.read_bytes() + write_jsonl(path.with_suffix(".tail"), records).read_bytes())


@pytest.mark.parametrize("how", ["file", "lines"])
def test_only_what_is_new_is_prepared(tmp_path, tokenizer, made, caplog, how) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", make_records(60, seed=1))
    (before,) = prepare([first], tokenizer, tmp_path / "s")
    old = [(tmp_path / "s/d/shards" / entry.file).read_bytes() for entry in before.shards]
    assert len(made) == len(before.shards) > 2
    made.clear()
    more, paths = make_records(40, seed=2), [first]
    if how == "file":
        paths.append(write_jsonl(tmp_path / "b.jsonl", more))
    else:
        append(first, more)
    with caplog.at_level(logging.INFO):
        (after,) = prepare(paths, tokenizer, tmp_path / "s")
    total = len(after.shards)
    assert f"its data has grown; {len(before.shards)} units are prepared, the others of {total} are now" in (
        caplog.text
    )
    assert made == [f"{number:05d}" for number in range(len(before.shards), total)]
    assert old == [(tmp_path / "s/d/shards" / entry.file).read_bytes() for entry in after.shards[: len(old)]]
    assert after.totals.rows == 100
    prepare(paths, tokenizer, tmp_path / "anew")
    assert rows_of(tmp_path / "s") == rows_of(tmp_path / "anew")
    made.clear()
    prepare(paths, tokenizer, tmp_path / "s")
    assert made == []
    assert open_training_data(data_config(paths), tokenizer, tmp_path / "s", 1).datasets[0].num_rows == 100


def test_a_last_line_without_a_break_that_becomes_another_line_is_told(tmp_path, tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_records(20, seed=1))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    prepare([path], tokenizer, tmp_path / "s")
    path.write_bytes(path.read_bytes() + b"\n" + json.dumps(make_records(1, seed=3)[0]).encode())
    with pytest.raises(DataError, match=r"a.jsonl had \d+ bytes, has \d+.*prepare anew: rm -r"):
        prepare([path], tokenizer, tmp_path / "s")


def test_new_records_with_an_id_of_old_ones_are_the_duplicates(tmp_path, tokenizer) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", make_records(30, seed=1))
    prepare([first], tokenizer, tmp_path / "s", on_bad_record="skip", max_bad_records=9)
    append(first, make_records(3, seed=1))
    (after,) = prepare([first], tokenizer, tmp_path / "s", on_bad_record="skip", max_bad_records=9)
    assert (after.totals.rows, after.totals.rejected) == (30, 3)


@pytest.mark.parametrize("position", [5, 55])
def test_a_bad_record_is_mended_and_nothing_deleted(tmp_path, tokenizer, made, position) -> None:
    records: list = make_records(60, seed=1)
    path = write_jsonl(tmp_path / "a.jsonl", [*records[:position], b'{"query": "q"}', *records[position:]])
    with pytest.raises(DataError, match=f"a.jsonl:{position + 1} pos"):
        prepare([path], tokenizer, tmp_path / "s")
    num_kept = len(made) - 1  # the last one met the record
    assert (num_kept > 0) == (position == 55)
    made.clear()
    (after,) = prepare([write_jsonl(path, records)], tokenizer, tmp_path / "s")
    assert after.totals.rows == 60
    assert made == [f"{number:05d}" for number in range(num_kept, len(after.shards))]
    prepare([path], tokenizer, tmp_path / "anew")
    assert rows_of(tmp_path / "s") == rows_of(tmp_path / "anew")


def test_a_reader_of_the_old_rows_is_served_until_the_new_ones_are_there(tmp_path, tokenizer) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_records(30, seed=1))
    prepare([path], tokenizer, tmp_path / "s")
    before = rows_of(tmp_path / "s")
    append(path, [*make_records(10, seed=2), b"{}"])
    with pytest.raises(DataError, match="a.jsonl:41"):
        prepare([path], tokenizer, tmp_path / "s")
    assert rows_of(tmp_path / "s") == before
