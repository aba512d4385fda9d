"""Trackers offline: the libraries themselves where they are installed, and stand-ins that fail."""

import logging
from pathlib import Path

import pytest

from megam3.errors import ConfigError
from megam3.obs import trackers
from megam3.obs.metrics import MetricsWriter
from megam3.obs.trackers import Trackers

SECRET = "0123456789abcdef0123456789abcdef01234567"


class Noted:
    """A tracker that notes what it gets, and fails at a step."""

    rows: list[tuple[int, dict[str, float]]] = []

    def __init__(self, run_dir: Path, start_step: int):
        Noted.rows = []

    def write(self, step, values) -> None:
        if step == 3:
            raise ConnectionError(f"https://user:{SECRET}@tracker.example is away")
        Noted.rows.append((step, dict(values)))

    def close(self) -> None:
        Noted.rows.append((-1, {}))


def test_the_figures_of_the_metrics_file_go_to_a_tracker(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Noted)
    monkeypatch.setenv(trackers.VARIABLE, "wandb")
    with MetricsWriter(tmp_path / "run") as metrics:
        metrics.write(1, {"loss/total": 2.5, "loss/dense": float("nan")})
    assert Noted.rows == [(1, {"loss/total": 2.5}), (-1, {})]


def test_a_tracker_that_fails_ends_no_run_and_tells_no_secret(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "wandb", Noted)
    opened = Trackers(tmp_path, 0, "wandb")
    with caplog.at_level(logging.WARNING):
        for step in (2, 3, 4):
            opened.write(step, {"a": 1.0})
        opened.close()
    assert Noted.rows == [(2, {"a": 1.0})]
    assert [record.getMessage() for record in caplog.records] == [
        "wandb fails (ConnectionError) and is left out from here on"
    ]
    assert SECRET not in caplog.text


def test_bad_names_and_missing_libraries(tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="MEGAM3_TRACKERS = 'wanbd': must be among wandb, mlflow"):
        Trackers(tmp_path, 0, "wanbd")

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(trackers.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"is not installed; pip install 'megam3\[mlflow\]'"):
        Trackers(tmp_path, 0, "mlflow")


def test_weights_and_biases_offline(tmp_path, monkeypatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra wandb)")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    run = tmp_path / "run"
    run.mkdir()
    opened = Trackers(run, 0, "wandb")
    opened.write(1, {"loss/total": 2.5})
    opened.close()
    files = [file for file in run.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    assert not [file for file in files if SECRET.encode() in file.read_bytes()]


def test_mlflow_in_a_local_store(tmp_path, monkeypatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (extra mlflow)")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    opened = Trackers(tmp_path / "one", 0, "mlflow")
    opened.write(1, {"loss/total": 2.5, "eval/heldout/Dense+Sparse/ndcg@10": 0.5})
    opened.close()
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("megam3").experiment_id])
    assert run.info.run_name == "one"
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"loss/total": 2.5, "eval/heldout/Dense_and_Sparse/ndcg_at_10": 0.5}
