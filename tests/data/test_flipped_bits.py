"""A store whose files change after they were written: no bit of it changes a batch without an error that
names the file, and what the error says to do mends it."""

import hashlib
import random
import re
import shutil
from pathlib import Path

import pytest

from megam3.data.dataset import open_training_data
from megam3.data.prepare import prepare_data
from megam3.errors import UserError
from tests.data.pairs import data_config, make_records, write_jsonl

NUM_FLIPS = 150


@pytest.fixture(scope="module")
def store(tmp_path_factory, tokenizer):
    """A store of several shards, and the settings it was made from."""
    folder = tmp_path_factory.mktemp("flips")
    records = [
        {**record, "pos_scores": [0.5], "neg_scores": [0.25]} for record in make_records(60, num_negatives=1)
    ]
    path = write_jsonl(folder / "d.jsonl", records)
    config = data_config(path, passages_per_query=2)
    prepare_data(config, tokenizer, folder / "s", unit_bytes=6000)
    return folder / "s", config


def digest_of_batches(data) -> str:
    """Of everything that an epoch of batches holds."""
    hasher = hashlib.sha256()
    for (batch,) in data.batches(0, 1, 0, data.num_steps_per_epoch):
        for name, value in sorted(vars(batch).items()):
            text = repr(vars(value) if name == "texts" else value)
            hasher.update(f"{name}={text}".encode())
        hasher.update(batch.texts.input_ids_T.numpy().tobytes())
    return hasher.hexdigest()


def outcome(config, tokenizer, folder: Path) -> str | UserError:
    """The batches of an epoch as a digest, or the error that a user reads instead."""
    try:
        return digest_of_batches(open_training_data(config, tokenizer, folder, 7))
    except UserError as error:
        return error


def test_a_flipped_bit_anywhere_is_an_error_that_names_the_file_or_changes_nothing(
    store, tokenizer, tmp_path
):
    folder, config = store
    expected = digest_of_batches(open_training_data(config, tokenizer, folder, 7))
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".arrow", ".json", ".npy"}
    rng, noticed = random.Random(11), 0
    copy = tmp_path / "s"
    shutil.copytree(folder, copy)
    for _ in range(NUM_FLIPS):
        path = copy / rng.choice(files)
        whole = path.read_bytes()
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
        found = outcome(config, tokenizer, copy)
        if isinstance(found, UserError):
            noticed += 1
            assert path.name in str(found) or "does not match the recipe" in str(found)
            assert re.search(r"delete|prepare", found.remedy), found
        else:
            assert found == expected, f"{path} silently gives other batches"
        path.write_bytes(whole)
    # shards, index, runs and manifest hold most of the bytes; what remains are summaries, read no more
    assert noticed > NUM_FLIPS // 4


@pytest.mark.parametrize("name", ["shards/00000.arrow", "index.npy", "runs.npy", "manifest.json"])
def test_what_the_error_says_to_do_mends_the_store(store, tokenizer, tmp_path, name):
    folder, config = store
    expected = digest_of_batches(open_training_data(config, tokenizer, folder, 7))
    copy = Path(shutil.copytree(folder, tmp_path / "s"))
    path = copy / "d" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=re.escape(path.name)) as error:
        open_training_data(config, tokenizer, copy, 7)
    assert "manifest.json" in str(error.value)
    assert "`megam3 prepare` again" in error.value.remedy
    path.unlink()
    path.with_suffix(".json").unlink(missing_ok=True)
    (copy / "d" / "manifest.json").unlink(missing_ok=True)
    assert digest_of_batches(open_training_data(config, tokenizer, copy, 7)) == expected
