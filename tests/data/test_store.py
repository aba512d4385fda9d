from types import SimpleNamespace

import pytest

from megam3.data import store
from megam3.data.prepare import prepare_data
from megam3.data.shard import to_arrow
from megam3.data.store import open_dataset, verify_dataset
from megam3.errors import DataError
from tests.data.pairs import data_config, make_records, write_jsonl


@pytest.fixture
def folder(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", make_records(80))
    prepare_data(data_config(path), tokenizer, tmp_path / "s", unit_bytes=3000)
    return tmp_path / "s"


def damage(path, offset: int) -> None:
    """Flip one bit."""
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(bytes(data))


def test_flipped_token_is_noticed_when_read_and_by_verify(folder):
    dataset = open_dataset(folder, "d")
    path = folder / "d" / "shards" / "00001.arrow"
    first_row = int(dataset.shard_starts[1])
    tokens = dataset.row(first_row).text(1).tobytes()
    damage(path, path.read_bytes().index(tokens) + 4)
    fresh = open_dataset(folder, "d")
    with pytest.raises(
        DataError,
        match=r"store file .*00001.arrow = 0: is a row whose checksum does not match; delete it"
        r" with its .json",
    ):
        fresh.row(first_row)
    with pytest.raises(DataError, match=r"store file .*00001.arrow = '.*': must have checksum"):
        verify_dataset(fresh)
    fresh.row(0)


@pytest.mark.parametrize("change", [lambda p: p.unlink(), lambda p: p.write_bytes(p.read_bytes()[:-8])])
def test_missing_or_shortened_shard(folder, change):
    change(folder / "d" / "shards" / "00000.arrow")
    with pytest.raises(DataError, match=r"store file .*00000.arrow = .*: must be a file of \d+ bytes"):
        open_dataset(folder, "d").row(0)


def test_overwritten_shard(folder):
    path = folder / "d" / "shards" / "00000.arrow"
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=r"00000.arrow = None: is no Arrow file any more"):
        open_dataset(folder, "d").row(0)


def test_damaged_index(folder):
    path = folder / "d" / "index.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"index.npy = None: cannot be read"):
        open_dataset(folder, "d")


def test_not_prepared_or_unfinished(folder, tmp_path):
    with pytest.raises(
        DataError, match="data.store_dir = .*: holds no finished dataset; run `megam3 prepare`"
    ):
        open_dataset(tmp_path, "other")
    (folder / "d" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="manifest.json.*: cannot be read"):
        open_dataset(folder, "d")


def test_other_format(folder):
    path = folder / "d" / "manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 9', 1))
    with pytest.raises(
        DataError,
        match=r"store format = 9: this version reads format 1 \(.*manifest.json\); prepare the data again",
    ):
        open_dataset(folder, "d")


def test_few_shards_are_open_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(store, "MAX_OPEN_SHARDS", 2)
    dataset = open_dataset(folder, "d")
    rows = [dataset.row(row).tokens.tolist() for row in range(dataset.num_rows)]
    assert len(dataset._open) == 2
    assert rows == [dataset.row(row).tokens.tolist() for row in range(dataset.num_rows)]


def test_any_dataset_name_is_a_folder_inside_the_store(tmp_path):
    assert store.dataset_folder(tmp_path, "../a/b").parent == tmp_path


def test_a_unit_of_more_tokens_than_offsets_reach():
    # ranges stand in for texts: their lengths alone are read before the refusal
    row = SimpleNamespace(texts=[range(1 << 30), range(1 << 30)])
    with pytest.raises(DataError, match=r"unit = 2147483648: holds more tokens than a shard can"):
        to_arrow([row])
