"""What is refused when all shards of a dataset are there, and where its messages point."""

import re

import pytest

from megam3.data import source
from megam3.data.finish import MAX_LANGUAGES, finish_dataset
from megam3.data.manifest import RowRun, ShardSummary, StoreSpec
from megam3.data.prepare import prepare_data
from megam3.errors import DataError
from tests.data.pairs import data_config, make_records, write_jsonl


def test_more_languages_than_codes_are_a_message(tmp_path, tokenizer):
    """70 000 values of `lang`, as when a field of another meaning is given that name."""
    config = data_config(write_jsonl(tmp_path / "d.jsonl", make_records(20)))
    prepare_data(config, tokenizer, tmp_path / "s")
    folder = tmp_path / "s" / "d"
    spec = StoreSpec.read(folder / "spec.json")
    summary = ShardSummary.read(folder / "shards" / "00000.json")
    runs = [RowRun(f"language {number}", 5, 1, 5) for number in range(MAX_LANGUAGES + 1)]
    message = (
        f"dataset d lang = '{MAX_LANGUAGES + 1} languages': holds more than {MAX_LANGUAGES} different values"
        " of `lang`, which no collection of texts does; give each record a code of its language, such as de,"
        " or leave `lang` out"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        finish_dataset(folder, "d", spec, [summary.model_copy(update={"runs": runs})])


def test_lines_are_counted_for_a_message_only(tmp_path, tokenizer, monkeypatch):
    """Knowing a record's line in the file means to read the file up to it: not once a unit."""
    counted = []
    original = source.first_line
    monkeypatch.setattr(source, "first_line", lambda unit: counted.append(unit) or original(unit))
    path = write_jsonl(tmp_path / "d.jsonl", make_records(80))
    (manifest,) = prepare_data(data_config(path), tokenizer, tmp_path / "s", unit_bytes=3000)
    assert len(manifest.shards) > 3
    assert [unit.start for unit in counted if unit.start > 0] == []
    mixed = write_jsonl(tmp_path / "e.jsonl", [*make_records(80), {"text": "a text"}])
    with pytest.raises(
        DataError, match=r"mixes pairs \(first at .*e.jsonl:1\) and texts \(first at .*e.jsonl:81\)"
    ):
        prepare_data(data_config(mixed), tokenizer, tmp_path / "t", unit_bytes=3000)
