"""What a loss spike and an overflow of fp16 leave behind: rows in log and file, a count that goes on."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest

from megam3.data.dataset import open_training_data
from megam3.data.tokenizer import load_tokenizer
from megam3.engine.deepspeed import UpdateResult
from megam3.step import StepReport, Wishes
from megam3.step_health import ROWS_SHOWN, SPIKES_FILE, SPIKES_KEPT, StepHealth
from tests.checkpoint.writing import STATE
from tests.data.pairs import data_config, make_records, write_jsonl
from tests.factory import write_tiny_tokenizer

FINE = UpdateResult(1.0, 1e-3, False)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("health")
    write_tiny_tokenizer(folder / "model")
    path = write_jsonl(folder / "d.jsonl", make_records(120, max_words=10))
    return open_training_data(data_config(path), load_tokenizer(folder / "model"), folder / "store", 1)


def make_run(folder, data, skipped=(), overflows=0):
    engine = SimpleNamespace(on_nonfinite="stop", max_skipped_steps=3)
    return SimpleNamespace(
        run_dir=str(folder),
        config=SimpleNamespace(engine=engine),
        data=data,
        state=replace(STATE, skipped=[list(pair) for pair in skipped], overflows=overflows),
    )


def report_of(loss):
    return StepReport(
        figures={"loss/total": loss},
        num_samples=8,
        num_tokens=1,
        padded_tokens=1,
        num_truncated=0,
        wishes=Wishes(),
        nonfinite="",
        seconds_by_part={},
    )


@pytest.mark.parametrize(("skipped", "place"), [([], 20), ([(3, 5), (21, 23)], 24)])
def test_a_spike_names_the_rows_that_the_step_was_given(tmp_path, data, caplog, skipped, place):
    health = StepHealth(make_run(tmp_path, data, skipped))
    with caplog.at_level(logging.WARNING):
        for step in range(20):
            health.check(report_of(2.0), FINE, step)
        assert not caplog.messages
        health.check(report_of(9.0), FINE, 20)
    ((batch,),) = data.batches(0, 1, 20, 21, skipped)
    rows = batch.rows.tolist()
    assert sorted(rows) == sorted(data.plan.batch(place).rows.tolist())
    line = json.loads((tmp_path / SPIKES_FILE).read_text())
    assert line["step"] == 21
    assert line["said"].startswith("loss 9, where the last 20 had a median of 2")
    assert sorted(line["batches"][0]["rows"]["d"]) == sorted(rows)
    said, remedy = caplog.messages
    shown = ", ".join(map(str, line["batches"][0]["rows"]["d"][:ROWS_SHOWN]))
    assert said.startswith("step 21: loss 9, where the last 20")
    assert f"d: rows {shown} and {len(rows) - ROWS_SHOWN} more" in said
    # the option counts from 0
    assert remedy == f"step 21: see them with `megam3 inspect-batch {tmp_path}/recipe.yaml --step 20`"


def test_a_run_that_diverges_does_not_fill_the_disk(tmp_path, data):
    health = StepHealth(make_run(tmp_path, data))
    health._spikes = SimpleNamespace(check=lambda loss: "a spike")
    for step in range(SPIKES_KEPT + 5):
        health.check(report_of(2.0), FINE, step)
    assert len((tmp_path / SPIKES_FILE).read_text().splitlines()) == SPIKES_KEPT


def test_a_file_that_cannot_be_written_ends_no_run(tmp_path, data, caplog):
    health = StepHealth(make_run(tmp_path / "gone", data))
    health._spikes = SimpleNamespace(check=lambda loss: "a spike")
    health.check(report_of(2.0), FINE, 4)
    assert "spikes.jsonl cannot be written (" in caplog.messages[-1]


def test_overflows_count_over_starts(tmp_path, data, caplog):
    health = StepHealth(make_run(tmp_path, data, overflows=3))
    with caplog.at_level(logging.INFO):
        health.check(report_of(2.0), UpdateResult(1.0, 1e-3, True, 512.0, True), 7)
    assert caplog.messages == [
        "step 8 overflowed fp16 at loss scale 512: skipped, the scale is halved (4 so far)"
    ]
    assert health.overflows == 4
