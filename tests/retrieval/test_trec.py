"""Run files as pytrec_eval's own reader understands them."""

import pytest
import pytrec_eval

from megam3.errors import DataError
from megam3.retrieval.trec import write_trec_run


def test_the_reference_reader_gets_every_score_back(tmp_path):
    results = {"q1": {"d2": 0.25, "d1": 0.75, "d3": 0.25}, "q2": {"d1": -1.5}}
    write_trec_run(tmp_path / "run", results, "dense")
    with open(tmp_path / "run") as file:
        assert pytrec_eval.parse_run(file) == results
    lines = (tmp_path / "run").read_text().splitlines()
    assert lines[:3] == ["q1 Q0 d1 1 0.75 dense", "q1 Q0 d2 2 0.25 dense", "q1 Q0 d3 3 0.25 dense"]


def test_an_id_with_a_space_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(DataError, match="must be one word; replace its white space"):
        write_trec_run(tmp_path / "run", {"q 1": {"d": 1.0}}, "dense")
    assert list(tmp_path.iterdir()) == []
