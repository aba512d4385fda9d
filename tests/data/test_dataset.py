"""From recipe to batches: the contract of RetrievalBatch, exact resume, other world sizes, refused
changes."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch

from megam3.batch import Batch, RetrievalBatch, TextBatch
from megam3.data import dataset
from megam3.data.dataset import open_on_every_rank, open_training_data
from megam3.data.shard import text_hash
from megam3.data.tokenizer import Tokenizer
from megam3.data.worker import changed_parts
from megam3.dist import comm
from megam3.errors import ConfigError, DataError
from megam3.packed_texts import PackedTexts
from tests.data.pairs import data_config, make_records, write_jsonl
from tests.ranks import run_ranks


def equal(first, second) -> bool:
    """Bitwise, field by field."""
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, list | tuple) and first and not isinstance(first[0], int):
        return len(first) == len(second) and all(equal(a, b) for a, b in zip(first, second))
    if hasattr(first, "__dataclass_fields__"):
        return all(equal(getattr(first, f.name), getattr(second, f.name)) for f in fields(first))
    return first == second


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    return write_jsonl(folder / "d.jsonl", make_records(150, num_negatives=3))


@pytest.fixture
def opened(corpus, tokenizer):
    def open_with(**options):
        defaults = {"batch": {"global_queries": 16}, "passages_per_query": 3}
        options = defaults | {"segment_shuffle_probability": 0.3, "segment_shuffle_min_tokens": 16} | options
        seed = options.pop("seed", 1)
        return open_training_data(data_config(corpus, **options), tokenizer, corpus.parent / "store", seed)

    return open_with


def test_batch_is_what_the_contract_says(opened, corpus, tokenizer):
    data, records = opened(segment_shuffle_probability=0.0), make_records(150, num_negatives=3)
    by_query = {tuple(tokenizer.encode([record["query"]], 32)[0][0].tolist()): record for record in records}
    for (batch,) in data.batches(1, 2, 0, data.num_steps_per_epoch):
        starts = torch.cat([torch.arange(n) for n in batch.texts.lengths])
        assert torch.equal(batch.texts.position_ids_T, starts)
        assert isinstance(batch, RetrievalBatch)
        assert isinstance(batch, Batch)
        assert (batch.texts.input_ids_T.dtype, batch.texts.cu_seqlens_N1.dtype) == (torch.int64, torch.int32)
        assert batch.texts.num_texts == batch.num_queries + batch.num_passages
        texts = [t.tolist() for t in batch.texts.input_ids_T.split(list(batch.texts.lengths))]
        cut = 0
        for query in range(batch.num_queries):
            record = by_query[tuple(texts[query])]
            group = range(int(batch.group_offsets_Q1[query]), int(batch.group_offsets_Q1[query + 1]))
            assert len(group) == 3
            for place, passage in enumerate(group):
                candidates = record["neg"] if place else record["pos"]
                (text,) = [
                    text for text in candidates if text_hash(text) == int(batch.passage_hashes_P[passage])
                ]
                ids, num_cut = tokenizer.encode([text], 128)
                assert texts[batch.num_queries + passage] == ids[0].tolist()
                cut += num_cut
            cut += tokenizer.encode([record["query"]], 32)[1]
        assert batch.num_truncated == cut
        assert (batch.dataset, batch.teacher_scores_P, batch.in_batch_negatives) == ("d", None, True)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_resume_at_any_step_is_bitwise_the_uninterrupted_run(opened, num_workers, accumulation):
    batch = {"global_queries": 16, "accumulation_steps": accumulation}
    data = opened(num_workers=num_workers, batch=batch)
    stop = 2 * data.num_steps_per_epoch + 1
    whole = list(data.batches(0, 2, 0, stop))
    assert all(len(step) == accumulation for step in whole)
    for start in (1, data.num_steps_per_epoch - 1, data.num_steps_per_epoch, stop - 1):
        again = list(opened(num_workers=num_workers, batch=batch).batches(0, 2, start, stop))
        assert equal(again, whole[start:])


def by_row(batches) -> dict:
    """row -> token ids of its group, over all ranks."""
    found = {}
    for batch in batches:
        texts = [t.tolist() for t in batch.texts.input_ids_T.split(list(batch.texts.lengths))]
        for query, row in enumerate(batch.rows_Q.tolist()):
            start, stop = batch.group_offsets_Q1[query : query + 2].tolist()
            found[row] = [texts[query], *texts[batch.num_queries + start : batch.num_queries + stop]]
    return found


def test_another_world_size_serves_the_same_rows_and_draws(opened):
    data = opened()
    stop = data.num_steps_per_epoch + 2
    one = [by_row(step) for step in data.batches(0, 1, 0, stop)]
    for world_size in (2, 4):
        ranks = [list(data.batches(rank, world_size, 0, stop)) for rank in range(world_size)]
        assert [by_row([ranks[rank][step][0] for rank in range(world_size)]) for step in range(stop)] == one


def test_every_row_once_an_epoch_over_ranks_and_workers(opened):
    data = opened(num_workers=2)
    rows = [
        row
        for rank in (0, 1)
        for (batch,) in data.batches(rank, 2, 0, data.num_steps_per_epoch)
        for row in batch.rows_Q.tolist()
    ]
    assert sorted(rows) == list(range(150))


def test_epochs_steps_and_state(opened):
    data = opened(batch={"global_queries": 16, "accumulation_steps": 4})
    batches = data.num_batches_per_epoch
    assert data.num_steps_per_epoch == -(-batches // 4)
    assert data.num_steps(2.5) == -(-5 * batches // 8)
    assert [data.epoch_of(step) for step in (0, batches // 4, batches)] == [
        0,
        (batches // 4) * 4 // batches,
        4,
    ]
    assert data.state(7) == {"seed": 1, "epoch": 7 * 4 // batches, "step": 7, "fingerprint": data.fingerprint}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"seed": 2}, ["plan"]),
        ({"batch": {"global_queries": 8}}, ["plan"]),
        ({"passages_per_query": 2}, ["plan"]),
        ({"segment_shuffle_probability": 0.1}, ["plan"]),
        ({"dataset": {"weight": 2.0}}, ["plan"]),
        ({"num_workers": 1}, []),
    ],
)
def test_changed_plan_is_refused_by_name(opened, change, names):
    data, other = opened(), opened(**change)
    assert changed_parts(data.fingerprint, other.fingerprint) == names
    if names:
        with pytest.raises(
            DataError,
            match=r"data fingerprint = .*: is not the run's: the plan \(seed, batch size,"
            r" .*changed; restore it",
        ):
            other.check_fingerprint(data.fingerprint)
    else:
        other.check_fingerprint(data.fingerprint)


def test_changed_data_is_refused_by_name(tmp_path, opened, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", make_records(150, seed=9, num_negatives=3))
    other = open_training_data(data_config(path, batch={"global_queries": 16}), tokenizer, tmp_path / "s", 1)
    with pytest.raises(DataError, match=r"the data \(contents of the store\) changed"):
        other.check_fingerprint(opened().fingerprint)


def test_more_ranks_than_queries(opened):
    data = opened(batch={"global_queries": 4})
    with pytest.raises(
        ConfigError,
        match=r"data.batch = \d: the plan's smallest batch has \d queries, fewer than the 8 ranks; use fewer",
    ):
        next(data.batches(0, 8, 0, 1))


def test_two_datasets_of_one_name(corpus, tokenizer, tmp_path):
    config = data_config(corpus)
    twice = config.model_copy(update={"train": [config.train[0], config.train[0]]})
    with pytest.raises(
        ConfigError, match=r"data.train\[\].name = \['d', 'd'\]: must be unique; rename a dataset"
    ):
        open_training_data(twice, tokenizer, tmp_path / "s", 0)


def test_teacher_scores_follow_their_passages(tmp_path, tokenizer):
    records = make_records(40, num_negatives=4)
    scores = {}
    for number, record in enumerate(records):
        record |= {"pos_scores": [number + 0.5], "neg_scores": [number + index / 10 for index in range(4)]}
        pairs = zip(record["pos"] + record["neg"], record["pos_scores"] + record["neg_scores"])
        scores |= {(record["query"], text_hash(text)): score for text, score in pairs}
    path = write_jsonl(tmp_path / "d.jsonl", records)
    data = open_training_data(data_config(path, passages_per_query=3), tokenizer, tmp_path / "s", 0)
    queries = {
        tuple(tokenizer.encode([record["query"]], 32)[0][0].tolist()): record["query"] for record in records
    }
    for (batch,) in data.batches(0, 1, 0, data.num_steps_per_epoch):
        texts = batch.texts.input_ids_T.split(list(batch.texts.lengths))
        for index in range(batch.num_queries):
            query = queries[tuple(texts[index].tolist())]
            for passage in range(*batch.group_offsets_Q1[index : index + 2].tolist()):
                expected = scores[query, int(batch.passage_hashes_P[passage])]
                assert float(batch.teacher_scores_P[passage]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("pack", [None, 64])
def test_texts_for_pretraining_share_store_plan_and_resume(tmp_path, tokenizer, pack):
    records = [{"text": record["pos"][0], "lang": record["lang"]} for record in make_records(100)]
    path = write_jsonl(tmp_path / "d.jsonl", records)
    data = open_training_data(data_config(path, pack_texts_tokens=pack), tokenizer, tmp_path / "s", 0)
    stop = data.num_steps_per_epoch
    whole = list(data.batches(0, 2, 0, stop))
    assert all(isinstance(batch, TextBatch) and isinstance(batch.texts, PackedTexts) for (batch,) in whole)
    assert all(isinstance(batch, Batch) for (batch,) in whole)
    assert equal(list(data.batches(0, 2, 3, stop)), whole[3:])
    rows = [
        row for rank in (0, 1) for (batch,) in data.batches(rank, 2, 0, stop) for row in batch.rows.tolist()
    ]
    assert sorted(rows) == list(range(100))
    sequences = sum(batch.texts.num_texts for (batch,) in whole)
    documents = sum(len(batch.rows) for (batch,) in whole)
    assert (sequences < documents) == (pack is not None)
    assert max(batch.texts.max_length for (batch,) in whole) <= 128


PROGRAM = """
import sys
from pathlib import Path
from megam3.config.schema import DataConfig
from megam3.data.dataset import open_on_every_rank, open_training_data
from megam3.data.tokenizer import Tokenizer
config = DataConfig.model_validate_json(Path(sys.argv[1]).read_text())
data = open_training_data(config, Tokenizer.from_json(Path(sys.argv[2]).read_text()), sys.argv[3], 1)
for (batch,) in data.batches(0, 2, int(sys.argv[4]), 2 * data.num_steps_per_epoch):
    print(batch.rows_Q.tolist(), hash(tuple(batch.texts.input_ids_T.tolist())), flush=True)
"""


def test_killed_reader_continues_with_the_same_batches(tmp_path, opened, corpus, tokenizer):
    """kill -9 in the middle of serving, workers on; started at the step it had reached, the rest is the
    same."""
    data = opened(num_workers=2)
    (tmp_path / "c.json").write_text(data.config.model_dump_json())
    (tmp_path / "t.json").write_text(tokenizer.to_json())
    arguments = [
        sys.executable,
        "-c",
        PROGRAM,
        str(tmp_path / "c.json"),
        str(tmp_path / "t.json"),
        data.store_dir,
    ]
    environment = os.environ | {"PYTHONPATH": "."}

    def serve(start: int, kill_after: int | None) -> list[str]:
        with subprocess.Popen(
            [*arguments, str(start)], stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            lines = []
            for line in process.stdout:
                lines.append(line)
                if len(lines) == kill_after:
                    os.kill(process.pid, signal.SIGKILL)
                    break
        return lines

    steps = data.batches(0, 2, 0, 2 * data.num_steps_per_epoch)
    whole = [
        f"{batch.rows_Q.tolist()} {hash(tuple(batch.texts.input_ids_T.tolist()))}\n" for (batch,) in steps
    ]
    served = serve(0, 7)
    assert served + serve(7, None) == whole


def _open_on_a_rank(config, tokenizer_json, store_dir):
    """Fingerprint, or the message, and whether this rank tokenised anything."""
    dataset.HEARTBEAT_SECONDS = 0.05
    prepared = []
    prepare = dataset.prepare_data

    def slowly(*arguments, **options):
        time.sleep(0.3)
        manifests = prepare(*arguments, **options | {"on_progress": prepared.append})
        return manifests

    dataset.prepare_data = slowly
    try:
        data = open_on_every_rank(config, Tokenizer.from_json(tokenizer_json), store_dir, 1)
    except DataError as error:
        return str(error)
    return data.fingerprint, bool(prepared)


@pytest.mark.ranks
def test_the_main_rank_prepares_while_the_others_wait(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", make_records(40))
    config = data_config(path, batch={"global_queries": 8})
    (first, has_first), (second, has_second) = run_ranks(
        _open_on_a_rank, 2, config, tokenizer.to_json(), str(tmp_path / "s")
    )
    assert (has_first, has_second) == (True, False)
    assert first == second == open_training_data(config, tokenizer, tmp_path / "s", 1).fingerprint


@pytest.mark.ranks
def test_waiting_ranks_say_that_the_main_rank_failed(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "d.jsonl", [*make_records(3), b"{"])
    messages = run_ranks(_open_on_a_rank, 2, data_config(path), tokenizer.to_json(), str(tmp_path / "s"))
    assert "d.jsonl:4 line" in messages[0]
    assert messages[1] == (
        f"data.store_dir = '{tmp_path / 's'}': a rank that opens it for the others could not; see its message"
    )


def _open_on_two_nodes(config, tokenizer_json, store_dir):
    """How often this rank of a, a, b, b compared the store's checksums, or what it was told; node b's are
    wrong where the store holds a file of that name."""
    node = "aabb"[comm.rank()]
    dataset.socket.gethostname = lambda: node
    verified = []
    verify = dataset.verify_files

    def verify_files(folder, manifest, num_threads):
        verified.append(folder)
        if node == "b" and (folder / "damaged on b").exists():
            raise DataError("store file", "index.npy", "must have another checksum", "delete it")
        return verify(folder, manifest, num_threads)

    dataset.verify_files = verify_files
    try:
        open_on_every_rank(config, Tokenizer.from_json(tokenizer_json), store_dir, 1)
    except DataError as error:
        return str(error)
    return len(verified)


@pytest.mark.ranks
def test_a_store_is_verified_once_on_every_node(tmp_path, tokenizer):
    """Each machine has its own memory and its own path to the files; its ranks share both."""
    path = write_jsonl(tmp_path / "d.jsonl", make_records(40))
    config = data_config(path, batch={"global_queries": 8})
    arguments = (config, tokenizer.to_json(), str(tmp_path / "s"))
    assert run_ranks(_open_on_two_nodes, 4, *arguments) == [1, 0, 1, 0]
    (tmp_path / "s" / "d" / "damaged on b").touch()
    said = run_ranks(_open_on_two_nodes, 4, *arguments)
    assert "must have another checksum" in said[2]
    assert ["a rank that opens it for the others could not" in said[rank] for rank in (0, 1, 3)] == [True] * 3
