import gzip
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from megam3.data.finish import finish_dataset
from megam3.data.manifest import ShardSummary, StoreSpec
from megam3.data.prepare import prepare_data
from megam3.data.shard import text_hash
from megam3.data.store import open_dataset, verify_dataset
from megam3.errors import ConfigError, DataError
from tests.data.pairs import data_config, make_records, write_jsonl


def contents(folder) -> dict[str, bytes]:
    """Every file of a store but its scratch."""
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()
    }


def prepare(config, tokenizer, store, **options):
    return prepare_data(config, tokenizer, store, **({"unit_bytes": 3000} | options))


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / "d.jsonl", make_records(120, num_negatives=2))


def test_rows_are_the_records(tmp_path, corpus, tokenizer):
    """Every record is there once, with the ids transformers gives, sorted by language and length within a
    shard."""
    config = data_config(
        corpus, dataset={"query_instruction": "ask: ", "passage_instruction": "text: "}, passage_max_tokens=40
    )
    (manifest,) = prepare(config, tokenizer, tmp_path / "s")
    dataset, records = open_dataset(tmp_path / "s", "d"), make_records(120, num_negatives=2)
    by_hash = {text_hash(record["query"]): record for record in records}
    assert len(manifest.shards) > 5
    seen = []
    for row in range(dataset.num_rows):
        stored = dataset.row(row)
        record = by_hash[int(stored.hashes[0])]
        texts = ["ask: " + record["query"], *("text: " + text for text in record["pos"] + record["neg"])]
        expected = [
            tokenizer.encode([text], limit)[0][0].tolist() for text, limit in zip(texts, [32, 40, 40, 40])
        ]
        assert [stored.text(index).tolist() for index in range(4)] == expected
        assert stored.hashes.tolist() == [
            text_hash(text) for text in [record["query"], *record["pos"], *record["neg"]]
        ]
        assert stored.truncated.tolist() == [
            len(tokenizer.encode([t], 999)[0][0]) > limit for t, limit in zip(texts, [32, 40, 40, 40])
        ]
        assert dataset.language_of(row) == record["lang"]
        lengths = [len(ids) for ids in expected]
        assert dataset.index[row].tolist() == (
            lengths[0],
            lengths[1],
            round((lengths[2] + lengths[3]) / 2),
            2,
        )
        seen.append((dataset.shard_of(row)[0], record["lang"], max(lengths)))
    assert seen == sorted(seen)
    assert manifest.totals.rows == 120 == len({stored for stored in by_hash})
    assert manifest.totals.truncated == sum(int(dataset.row(row).truncated.sum()) for row in range(120)) > 0


def test_prompt_takes_the_place_of_the_instruction_and_none_is_no_word(tmp_path, tokenizer):
    path = write_jsonl(
        tmp_path / "d.jsonl",
        [{"query": "ba", "pos": ["p"], "prompt": "dodo "}, {"query": "ba", "pos": ["p p"]}],
    )
    for name, instruction, first in (("a", "kiki ", "kiki ba"), ("b", "", "ba")):
        prepare(data_config(path, dataset={"query_instruction": instruction}), tokenizer, tmp_path / name)
        dataset = open_dataset(tmp_path / name, "d")
        found = {tokenizer.decode(dataset.row(row).text(0), skip_special_tokens=True) for row in range(2)}
        assert found == {"dodo ba", first}


def test_symmetric_types_instruct_both_sides(tmp_path, tokenizer):
    records = [{"query": "ba", "pos": ["ki"], "type": kind} for kind in ("symmetric_sts", "normal")]
    options = {"query_instruction": "dodo ", "passage_instruction": "lala "}
    prepare(
        data_config(write_jsonl(tmp_path / "d.jsonl", records), dataset=options), tokenizer, tmp_path / "s"
    )
    dataset = open_dataset(tmp_path / "s", "d")
    found = {tokenizer.decode(dataset.row(row).text(1), skip_special_tokens=True) for row in range(2)}
    assert found == {"dodo ki", "lala ki"}


def test_parallel_and_by_shards_give_identical_bytes(tmp_path, corpus, tokenizer):
    config = data_config(corpus)
    prepare(config, tokenizer, tmp_path / "one")
    prepare(config, tokenizer, tmp_path / "two", num_processes=2)
    for index in (2, 0, 1):
        finished = prepare(config, tokenizer, tmp_path / "three", shard=(index, 3))
        assert len(finished) == (index == 1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "three")


def test_finished_store_is_left_alone(tmp_path, corpus, tokenizer):
    prepare(data_config(corpus), tokenizer, tmp_path / "s")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")}
    calls = []
    prepare(data_config(corpus), tokenizer, tmp_path / "s", on_progress=calls.append)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*")}
    assert not calls


def test_only_unfinished_units_are_redone(tmp_path, corpus, tokenizer):
    prepare(data_config(corpus), tokenizer, tmp_path / "s")
    whole, shards = contents(tmp_path / "s"), tmp_path / "s" / "d" / "shards"
    (tmp_path / "s" / "d" / "manifest.json").unlink()
    (shards / "00003.json").unlink()
    (shards / "00003.arrow").write_bytes(b"half")
    calls = []
    prepare(data_config(corpus), tokenizer, tmp_path / "s", on_progress=calls.append)
    assert [call.units_total for call in calls] == [1]
    assert contents(tmp_path / "s") == whole


PROGRAM = """
import sys
from pathlib import Path
from megam3.config.schema import DataConfig
from megam3.data.prepare import prepare_data
from megam3.data.tokenizer import Tokenizer
config = DataConfig.model_validate_json(Path(sys.argv[1]).read_text())
tokenizer = Tokenizer.from_json(Path(sys.argv[2]).read_text())
prepare_data(config, tokenizer, sys.argv[3], num_processes=int(sys.argv[4]), unit_bytes=3000)
"""


def killed_prepares(tmp_path, config, tokenizer, num_kills: int) -> int:
    """Start `prepare` again and again, kill it after a growing share of a second, let the last one end.
    Returns how many were killed."""
    (tmp_path / "config.json").write_text(config.model_dump_json())
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    rng, kills = np.random.default_rng(0), 0
    while True:
        arguments = [str(tmp_path / name) for name in ("config.json", "tokenizer.json", "killed")]
        # a group of its own: the kill takes the workers along, as a scheduler's does
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments, "2"], start_new_session=True)
        if kills == num_kills:
            assert process.wait() == 0
            return kills
        time.sleep(0.4 + float(rng.random()) * 1.2)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        elif (tmp_path / "killed" / "d" / "manifest.json").exists():
            shutil.rmtree(
                tmp_path / "killed"
            )  # it was too quick: begin anew, so that every kill hits a working process


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_and_started_again_ends_with_identical_bytes(tmp_path, tokenizer, num_kills):
    path = write_jsonl(tmp_path / "d.jsonl", make_records(600, num_negatives=6))
    config = data_config(path)
    prepare(config, tokenizer, tmp_path / "whole")
    assert killed_prepares(tmp_path, config, tokenizer, num_kills) == num_kills
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"passage_max_tokens": 64}, "passage_max_tokens was 128, is 64"),
        ({"query_max_tokens": 16}, "query_max_tokens was 32, is 16"),
        ({"dataset": {"query_instruction": "x"}}, "query_instruction was '', is 'x'"),
        ({"dataset": {"language": "de"}}, "language was 'und', is 'de'"),
    ],
)
def test_changed_settings_are_named(tmp_path, corpus, tokenizer, change, message):
    prepare(data_config(corpus), tokenizer, tmp_path / "s")
    with pytest.raises(
        DataError,
        match=rf"store of dataset d = .*{message}.*does not match the recipe .*; go back to what it was"
        r" prepared from, .*or prepare anew: rm -r \S+/s/d && megam3 prepare RECIPE",
    ):
        prepare(data_config(corpus, **change), tokenizer, tmp_path / "s")
    shutil.rmtree(tmp_path / "s" / "d")  # what the message says
    assert prepare(data_config(corpus, **change), tokenizer, tmp_path / "s")


def test_changed_inputs_are_named(tmp_path, corpus, tokenizer):
    prepare(data_config(tmp_path), tokenizer, tmp_path / "s")
    os.utime(corpus)  # a copy or a touch is no change
    prepare(data_config(tmp_path), tokenizer, tmp_path / "s")
    original = corpus.read_bytes()
    corpus.write_bytes(original.replace(b'"lang": "de"', b'"lang": "fr"', 1))
    with pytest.raises(DataError, match="d.jsonl has other contents"):
        prepare(data_config(tmp_path), tokenizer, tmp_path / "s")
    corpus.write_bytes(original[: len(original) // 2])
    with pytest.raises(DataError, match=r"d.jsonl had \d+ bytes, has \d+"):
        prepare(data_config(tmp_path), tokenizer, tmp_path / "s")


def test_stop_names_file_and_line(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", [*make_records(70), b'{"query": "q"}', *make_records(5, seed=1)])
    for processes in (0, 2):
        with pytest.raises(
            DataError, match=r"d.jsonl:71 pos = None: must hold at least one passage; correct the record"
        ):
            prepare(data_config(path), tokenizer, tmp_path / f"s{processes}", num_processes=processes)


BAD = [
    b"{",
    b'{"query": "\xff\xfe", "pos": ["p"]}',
    b"[]",
    b'{"query": "", "pos": ["p"]}',
    b'{"query": "q", "pos": [""]}',
]


@pytest.mark.parametrize("processes", [0, 2])
def test_skip_counts_and_keeps_rejected_lines(tmp_path, tokenizer, processes):
    good = make_records(60)
    path = write_jsonl(tmp_path / "d.jsonl", [*good[:30], *BAD, *good[30:]])
    config = data_config(path, on_bad_record="skip", max_bad_records=5)
    (manifest,) = prepare(config, tokenizer, tmp_path / "s", num_processes=processes)
    assert (manifest.totals.rows, manifest.totals.rejected) == (60, 5)
    assert sum(manifest.totals.reasons.values()) == 5
    assert "pos: must not be empty" in manifest.totals.reasons
    kept = [json.loads(line) for line in (tmp_path / "s" / "d" / "rejected.jsonl").read_text().splitlines()]
    assert [entry["record"].encode("utf-8", "surrogateescape") for entry in kept] == [
        line + b"\n" for line in BAD
    ]
    assert "is not valid UTF-8" in kept[1]["reason"]


def test_skip_has_a_limit(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", [*make_records(60), *BAD])
    with pytest.raises(
        DataError,
        match=r"d.jsonl:65 .*must not be empty|rejected records = 5: is more than data.max_bad_records = 4",
    ):
        prepare(data_config(path, on_bad_record="skip", max_bad_records=4), tokenizer, tmp_path / "s")


def test_limit_counts_over_units(tmp_path, tokenizer):
    records = make_records(60)
    path = write_jsonl(tmp_path / "d.jsonl", [BAD[0], *records, BAD[0]])
    with pytest.raises(
        DataError, match="rejected records = 2: is more than data.max_bad_records = 1; see the"
    ):
        prepare(data_config(path, on_bad_record="skip", max_bad_records=1), tokenizer, tmp_path / "s")


def test_duplicate_ids(tmp_path, tokenizer):
    records = make_records(60)
    path = write_jsonl(tmp_path / "d.jsonl", [*records, records[3], records[50]])
    with pytest.raises(
        DataError, match=r"d.jsonl:61 id = '0-3': is a duplicate: an earlier record has the same id"
    ):
        prepare(data_config(path), tokenizer, tmp_path / "stop")
    config = data_config(path, on_bad_record="skip")
    (manifest,) = prepare(config, tokenizer, tmp_path / "skip")
    assert (manifest.totals.rows, manifest.totals.rejected) == (60, 2)
    verify_dataset(open_dataset(tmp_path / "skip", "d"))


def test_no_usable_record(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", [b"{"])
    with pytest.raises(DataError, match="dataset d = '1 records rejected': holds no usable record"):
        prepare(data_config(path, on_bad_record="skip"), tokenizer, tmp_path / "s")
    (tmp_path / "e.jsonl").touch()
    with pytest.raises(DataError, match="dataset d = '0 records rejected': holds no usable record"):
        prepare(data_config(tmp_path / "e.jsonl"), tokenizer, tmp_path / "t")


def test_pairs_and_texts_do_not_mix(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", [*make_records(20), {"text": "x"}])
    with pytest.raises(
        DataError,
        match=r"mixes pairs \(first at .*d.jsonl:1\) and texts \(first at .*d.jsonl:21\); make two datasets",
    ):
        prepare(data_config(path), tokenizer, tmp_path / "s")


def test_teacher_scores_in_all_records_or_none(tmp_path, tokenizer):
    scored = [record | {"pos_scores": [1.0], "neg_scores": []} for record in make_records(20)]
    path = write_jsonl(tmp_path / "d.jsonl", [*scored, *make_records(2, seed=1)])
    with pytest.raises(
        DataError, match=r"has teacher scores in 20 records but not in all \(first without: .*d.jsonl:21\)"
    ):
        prepare(data_config(path), tokenizer, tmp_path / "s")


def test_truncated_input_leaves_nothing_half(tmp_path, tokenizer):
    plain = write_jsonl(tmp_path / "p.jsonl", make_records(60)).read_bytes()
    path = tmp_path / "d.jsonl.gz"
    path.write_bytes(gzip.compress(plain)[:-50])
    with pytest.raises(DataError, match=r"d.jsonl.gz.*cannot be read to its end"):
        prepare(data_config(path), tokenizer, tmp_path / "s")
    path.write_bytes(gzip.compress(plain))
    assert prepare(data_config(path), tokenizer, tmp_path / "s")[0].totals.rows == 60


def test_limits_beyond_the_index(tmp_path, corpus, tokenizer):
    with pytest.raises(ConfigError, match="data.passage_max_tokens = 70000: must be at most 65535"):
        prepare(data_config(corpus, passage_max_tokens=70_000), tokenizer, tmp_path / "s")


def test_store_folder_that_cannot_be_made(tmp_path, corpus, tokenizer):
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"data.store_dir = .*: cannot be made .*choose a folder that can be written to"
    ):
        prepare(data_config(corpus), tokenizer, tmp_path / "file")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("may not mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("processes", [0, 2])
def test_full_disk(tmp_path, corpus, tokenizer, small_disk, processes):
    with pytest.raises(
        DataError, match=r"store file = .*could not be written \(.*No space left.*make room or choose another"
    ):
        prepare(data_config(corpus), tokenizer, small_disk, num_processes=processes)
    complete = len(list(small_disk.rglob("0*.json")))
    assert not list(small_disk.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    calls = []
    prepare(data_config(corpus), tokenizer, small_disk, on_progress=calls.append)
    prepare(data_config(corpus), tokenizer, tmp_path / "whole")
    assert complete + len(calls) == len(open_dataset(small_disk, "d").manifest.shards)
    assert contents(small_disk) == contents(tmp_path / "whole")


def test_what_an_error_interrupts_leaves_no_temporary_file(tmp_path, corpus, tokenizer):
    """Workers are killed in the middle of their units when another unit's error ends the preparation."""
    store = tmp_path / "s"
    ended = subprocess.Popen(["true"])
    ended.wait()
    half = store / "d" / "shards" / f"00003.arrow.{socket.gethostname()}-{ended.pid}-1.tmp"

    def interrupt(progress):
        half.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data_config(corpus), tokenizer, store, num_processes=2, on_progress=interrupt)
    assert not list(store.rglob("*.tmp"))


def test_file_size_limit(tmp_path, corpus, tokenizer):
    """The same for those who may not mount: a shard that does not fit leaves no trace."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"could not be written \(.*File too large"):
            prepare(data_config(corpus), tokenizer, tmp_path / "s", unit_bytes=20_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "s").rglob("*.arrow*"))


def test_manifest_is_a_function_of_the_summaries(tmp_path, corpus, tokenizer):
    prepare(data_config(corpus), tokenizer, tmp_path / "s")
    folder = tmp_path / "s" / "d"
    before, spec = contents(folder), StoreSpec.read(folder / "spec.json")
    summaries = [ShardSummary.read(path) for path in sorted((folder / "shards").glob("0*.json"))]
    finish_dataset(folder, "d", spec, summaries)
    assert contents(folder) == before


def test_only_temporary_files_of_ended_processes_are_deleted(tmp_path, corpus, tokenizer):
    prepare(data_config(corpus), tokenizer, tmp_path / "s")
    folder, host = tmp_path / "s" / "d", socket.gethostname()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    at_work = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    kept = [
        folder / f"manifest.json.{host}-{at_work.pid}-7.tmp",  # another task of an array
        folder / "shards" / "00000.arrow.elsewhere-1-1.tmp",  # on another host: nothing is known of it
        folder / "notes.tmp",  # somebody else's
    ]
    gone = [
        folder / f"index.npy.{host}-{ended.pid}-1.tmp",
        folder / "shards" / "00001.json.elsewhere-2-2.tmp",
    ]
    for path in (*kept, *gone):
        path.touch()
    os.utime(gone[1], (0, 0))
    (folder / "manifest.json").unlink()
    try:
        prepare(data_config(corpus), tokenizer, tmp_path / "s")
    finally:
        at_work.communicate(b"\n")
    assert [path.exists() for path in (*kept, *gone)] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_dataset_names_that_leave_the_store(tmp_path, corpus, tokenizer, name):
    config = data_config(corpus)
    config = config.model_copy(update={"train": [config.train[0].model_copy(update={"name": name})]})
    with pytest.raises(
        DataError, match=r"data.train\[\].name = '\.*': names no folder inside the store; rename"
    ):
        prepare(config, tokenizer, tmp_path / "s")
    assert not (tmp_path / "s").exists()
