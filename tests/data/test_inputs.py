"""Data that moves, or is only copied, is the data a store was made from; other data is named."""

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from megam3.data import inputs
from megam3.data import prepare as prepare_module
from megam3.data.dataset import open_training_data
from megam3.data.encode import input_digest
from megam3.data.prepare import prepare_data
from megam3.data.trace import source_of
from megam3.errors import DataError
from tests.data.pairs import data_config, make_records, write_jsonl


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Paths whose contents were read to recognise them."""
    read: list[str] = []

    def digest(unit, reader=None):
        read.append(unit.path)
        return input_digest(unit, reader)

    monkeypatch.setattr(inputs, "input_digest", digest)
    return read


def prepare(paths: Path, tokenizer, store: Path, processes: int = 0) -> list:
    return prepare_data(data_config(paths), tokenizer, store, processes, unit_bytes=3000)


def two_files(folder: Path) -> Path:
    folder.mkdir()
    for name, seed in (("a.jsonl", 1), ("b.jsonl", 2)):
        write_jsonl(folder / name, make_records(40, seed=seed))
    return folder


def test_moved_data_is_known_by_its_contents_once(tmp_path, tokenizer, counted, caplog) -> None:
    old = two_files(tmp_path / "old")
    (before,) = prepare(old, tokenizer, tmp_path / "s")
    new = tmp_path / "another disk"
    old.rename(new)
    with caplog.at_level(logging.INFO):
        (after,) = prepare(new, tokenizer, tmp_path / "s")
    assert "same contents, other paths or dates of its inputs" in caplog.text
    assert {Path(path) for path in counted} == {new / "a.jsonl", new / "b.jsonl"}
    assert after.fingerprint == before.fingerprint
    assert [unit.path.startswith(str(new)) for unit in after.spec.units] == [True] * len(after.spec.units)
    counted.clear()
    prepare(new, tokenizer, tmp_path / "s")
    assert counted == [], "a second start reads nothing again"
    # and the line of a record is looked up where the data is now
    data = open_training_data(data_config(new), tokenizer, tmp_path / "s", 7)
    path, _, line = source_of(data, 41).rpartition(":")
    assert json.loads(Path(path).read_text().splitlines()[int(line) - 1])["query"]


def test_a_new_date_is_read_once_and_noted(tmp_path, tokenizer, counted) -> None:
    data = two_files(tmp_path / "data")
    prepare(data, tokenizer, tmp_path / "s")
    os.utime(data / "a.jsonl")
    prepare(data, tokenizer, tmp_path / "s")
    assert {Path(path).name for path in counted} == {"a.jsonl"}
    counted.clear()
    prepare(data, tokenizer, tmp_path / "s")
    assert counted == []


def test_files_that_only_changed_their_names_are_told_apart(tmp_path, tokenizer) -> None:
    data = tmp_path / "data"
    data.mkdir()
    records = [{key: value for key, value in record.items() if key != "id"} for record in make_records(40)]
    write_jsonl(data / "a.jsonl", records)
    write_jsonl(data / "b.jsonl", records[::-1])  # as many bytes
    (before,) = prepare(data, tokenizer, tmp_path / "s")
    (data / "a.jsonl").rename(data / "y.jsonl")
    (data / "b.jsonl").rename(data / "x.jsonl")
    (after,) = prepare(data, tokenizer, tmp_path / "s")
    first = [unit for unit in after.spec.units if unit.path.endswith("y.jsonl")]
    assert len(first) == len([unit for unit in before.spec.units if unit.path.endswith("a.jsonl")])
    assert after.spec.units[: len(first)] == first


def test_an_unfinished_store_is_completed_from_where_the_data_is_now(tmp_path, tokenizer) -> None:
    whole = prepare(two_files(tmp_path / "data"), tokenizer, tmp_path / "whole")
    old = two_files(tmp_path / "old")
    prepare_data(data_config(old), tokenizer, tmp_path / "s", shard=(0, 2), unit_bytes=3000)
    old.rename(tmp_path / "new")
    (done,) = prepare(tmp_path / "new", tokenizer, tmp_path / "s")
    assert done.fingerprint == whole[0].fingerprint


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"lang": "de"', b'"lang": "fr"', 1))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (edit, r"new/b.jsonl was not there; .*old/b.jsonl is gone"),
        (lambda path: path.write_bytes(path.read_bytes() + b"{}\n"), r"new/b.jsonl was not there"),
        (Path.unlink, r"old/b.jsonl is gone"),
    ],
)
def test_moved_and_changed_data_is_refused(
    tmp_path, tokenizer, change: Callable[[Path], object], said: str
) -> None:
    old = two_files(tmp_path / "old")
    prepare(old, tokenizer, tmp_path / "s")
    before = (tmp_path / "s" / "d" / "spec.json").read_bytes()
    old.rename(tmp_path / "new")
    change(tmp_path / "new" / "b.jsonl")
    with pytest.raises(DataError, match=said):
        prepare(tmp_path / "new", tokenizer, tmp_path / "s")
    assert (tmp_path / "s" / "d" / "spec.json").read_bytes() == before


def test_a_rank_whose_machine_has_looked_reads_no_moved_data_again(
    tmp_path, tokenizer, counted, monkeypatch
) -> None:
    old = two_files(tmp_path / "old")
    prepare(old, tokenizer, tmp_path / "s")
    old.rename(tmp_path / "new")

    def refuse(path: Path, blocks: object) -> str:
        raise DataError("store file", str(path), "could not be written (Read-only file system)", "make room")

    monkeypatch.setattr(prepare_module, "write_checked", refuse)
    opened = open_training_data(data_config(tmp_path / "new"), tokenizer, tmp_path / "s", 1, verify=False)
    assert opened.datasets[0].num_rows == 80
    assert counted == []


def test_a_store_that_can_only_be_read_serves_data_that_moved(tmp_path, tokenizer, caplog) -> None:
    old = two_files(tmp_path / "old")
    prepare(old, tokenizer, tmp_path / "s")
    shutil.copytree(old, tmp_path / "new")
    bind = ["mount", "--bind", str(tmp_path / "s"), str(tmp_path / "s")]
    if subprocess.run(bind, check=False).returncode:
        pytest.skip("cannot mount")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(tmp_path / "s")], check=True)
        with caplog.at_level(logging.WARNING):
            prepare(tmp_path / "new", tokenizer, tmp_path / "s")
        assert "inputs have moved, which cannot be noted: store file" in caplog.text
        assert "Read-only file system" in caplog.text
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "s")], check=False)
