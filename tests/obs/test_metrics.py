import json
import math

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megam3.obs.metrics import MetricsWriter, read_metrics


def test_lines_are_strict_json_and_flushed_at_once(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"loss": 2.5})
    writer.write(2, {"loss": math.inf})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=lambda x: 1 / 0) for line in lines] == [
        {"step": 1, "loss": 2.5},
        {"step": 2, "loss": None, "nonfinite": {"loss": "inf"}},
    ]
    writer.close()


def test_resuming_keeps_every_step_once(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # the run was killed in the middle of a line
    with MetricsWriter(tmp_path, start_step=3) as writer:
        writer.write(4, {"loss": 40.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_tensorboard_has_the_same_numbers(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss/dense": 0.25})
        writer.write(2, {"loss/dense": 0.125})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/dense")] == [(1, 0.25), (2, 0.125)]
