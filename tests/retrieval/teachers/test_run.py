"""Scores written into records: every passage its own, in parts that survive a kill."""

import json

import numpy as np
import pytest

from megam3.cli import main
from megam3.data.record import parse_record
from megam3.errors import TrainingError
from megam3.retrieval.teachers import run
from tests.data.pairs import write_jsonl
from tests.factory import make_sentences, make_tiny_model_folder
from tests.retrieval.teachers.test_cross_encoder import make_folder, naive

TEXTS = make_sentences(40, seed=8)
RECORDS = [
    {
        "query": TEXTS[n],
        "pos": TEXTS[n + 1 : n + 2 + n % 2],
        "neg": TEXTS[n + 5 : n + 5 + n % 4],
        "id": str(n),
    }
    for n in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("teacher"), 1)


@pytest.fixture
def place(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", RECORDS)
    return tmp_path


def add(place, folder, *more, output="out.jsonl"):
    arguments = [str(place / "in.jsonl"), str(place / output), "--model", str(folder), "--device", "cpu"]
    code = main(["add-teacher-scores", *arguments, *more])
    lines = (place / output).read_text().splitlines() if (place / output).exists() else []
    return code, [json.loads(line) for line in lines]


def test_every_passage_gets_its_score(place, folder, monkeypatch, capsys):
    monkeypatch.setattr(run, "PAIRS_AT_ONCE", 7)
    code, got = add(place, folder)
    assert code == 0
    for record, before in zip(got, RECORDS, strict=True):
        wanted = naive(folder, [(record["query"], passage) for passage in before["pos"] + before["neg"]], 64)
        assert record["pos_scores"] + record["neg_scores"] == pytest.approx(wanted, abs=1e-4)
        assert len(record["pos_scores"]) == len(before["pos"])
        assert {key: record[key] for key in before} == before
        assert len(parse_record(record).scores) == len(before["pos"] + before["neg"])
    said = capsys.readouterr().out
    assert "scores in 12 records by a cross-encoder" in said
    assert "teacher_temperature" not in said, "logits lie units apart"


def test_a_sigmoid_when_asked(place, folder, capsys):
    _, raw = add(place, folder)
    _, squashed = add(place, folder, "--normalize", output="squashed.jsonl")
    for a, b in zip(raw, squashed):
        assert b["pos_scores"] == pytest.approx(
            (1 / (1 + np.exp(-np.array(a["pos_scores"])))).tolist(), abs=1e-5
        )
    assert (
        "at objective.teacher_temperature 1 all passages of a query get nearly the same"
        in capsys.readouterr().out
    )


def test_a_bi_encoder_is_said_to_need_a_temperature(place, tmp_path, capsys):
    code, _ = add(place, make_tiny_model_folder(tmp_path / "retriever"))
    assert code == 0
    assert "scores in 12 records by a megam3\nthese scores lie close together" in capsys.readouterr().out


def test_a_killed_run_continues(place, folder, monkeypatch):
    monkeypatch.setattr(run, "PART_BYTES", 600)
    _, whole = add(place, folder, output="whole.jsonl")
    original, done = run._score_unit, []

    def dies(teacher, options, unit, emit):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(unit)
        return original(teacher, options, unit, emit)

    monkeypatch.setattr(run, "_score_unit", dies)
    with pytest.raises(KeyboardInterrupt):
        add(place, folder)
    again = []
    monkeypatch.setattr(run, "_score_unit", lambda *given: again.append(given[2]) or original(*given))
    assert add(place, folder)[1] == whole
    assert again
    assert not set(again) & set(done)


def test_scores_of_the_wrong_length_are_named(place, folder, capsys):
    write_jsonl(place / "in.jsonl", [RECORDS[0], {**RECORDS[1], "pos_scores": [1.0], "neg_scores": [1.0]}])
    assert add(place, folder)[0] == 2
    assert "in.jsonl:2 pos_scores = [1.0]: must hold 2 teacher scores" in capsys.readouterr().err


class Broken:
    def score(self, pairs):
        return np.full(len(pairs), np.nan, dtype=np.float32)


def test_a_score_that_is_not_finite_stops(place, folder):
    options = run.TeacherOptions(
        inputs=(str(place / "in.jsonl"),), output=place / "o", work=place / "w", model=folder, settings={}
    )
    with pytest.raises(TrainingError, match="gave a score that is not finite; try --precision fp32"):
        run.add_teacher_scores(Broken(), options)


def test_a_model_that_is_missing_or_an_output_that_exists(place, folder, capsys):
    assert add(place, "nowhere")[0] == 2
    assert "model = 'nowhere': is no folder on this machine" in capsys.readouterr().err
    (place / "out.jsonl").write_text("")
    assert add(place, folder)[0] == 2
    assert "exists already; remove it" in capsys.readouterr().err
