"""Best step and early end from figures by step, and their file."""

from pathlib import Path

import pytest

from megam3.checkpoint.evaluations import FILE, Evaluations
from megam3.config.schema import EarlyStoppingConfig, MetricConfig

ALL = MetricConfig()


def filled(run_dir: Path, *values: float) -> Evaluations:
    evaluations = Evaluations(str(run_dir), 0)
    for number, value in enumerate(values, 1):
        figures = {"eval/a/All/ndcg@10": value, "eval/a/Dense+Sparse/ndcg@10": 0.9, "eval/a/All/mrr@10": 0.1}
        evaluations.add(10 * number, {**figures, "eval/b/All/ndcg@10": value + 0.2})
    return evaluations


def test_a_metric_is_the_mean_over_test_sets_of_the_mode_that_was_named(tmp_path):
    evaluations = filled(tmp_path, 0.4, 0.5)
    assert evaluations.values(ALL) == {10: pytest.approx(0.5), 20: pytest.approx(0.6)}
    assert evaluations.values(MetricConfig(mode="All", metric="mrr@10")) == {10: 0.1, 20: 0.1}
    assert evaluations.values(MetricConfig(mode="Sparse")) == {}


def test_the_best_is_looked_for_among_the_checkpoints_there_are(tmp_path):
    evaluations = filled(tmp_path, 0.4, 0.6, 0.6, 0.5)
    assert evaluations.best_step(ALL, [10, 20, 30, 40]) == 20  # the earlier of equal ones
    assert evaluations.best_step(ALL, [10, 40, 50]) == 40
    assert evaluations.best_step(ALL, [50]) is None


@pytest.mark.parametrize(
    ("values", "min_gain", "since"),
    [
        ((), 0.0, 0),
        ((0.1, 0.2, 0.3), 0.0, 0),
        ((0.1, 0.3, 0.2, 0.3), 0.0, 2),
        ((0.1, 0.15, 0.18), 0.1, 2),
        ((0.1, 0.15, 0.26), 0.1, 0),
    ],
)
def test_evaluations_without_gain_are_counted_since_the_last_gain(tmp_path, values, min_gain, since):
    assert filled(tmp_path, *values).num_without_gain(ALL, min_gain) == since


def test_a_run_ends_when_patience_does(tmp_path, caplog):
    caplog.set_level("INFO")
    evaluations = filled(tmp_path, 0.3, 0.2)
    assert not evaluations.end_run(None, 20)
    assert not evaluations.end_run(EarlyStoppingConfig(patience=2), 20)
    assert evaluations.end_run(EarlyStoppingConfig(patience=1), 20)
    assert "step 20: ended early, All ndcg@10 has not got better for 1 evaluations" in caplog.text


def test_a_run_that_is_started_again_knows_the_figures_up_to_its_step(tmp_path):
    filled(tmp_path, 0.4, 0.5, 0.3)
    assert list(Evaluations(str(tmp_path), 20).values(ALL)) == [10, 20]


@pytest.mark.parametrize("content", [b"\xff\x00", b"[1]", b'{"x": {}}', b"{"])
def test_a_damaged_file_costs_the_best_one_and_not_the_run(tmp_path, caplog, content):
    filled(tmp_path, 0.4)
    (tmp_path / "checkpoints" / FILE).write_bytes(content)
    assert Evaluations(str(tmp_path), 100).values(ALL) == {}
    assert "the best checkpoint is looked for anew" in caplog.text
