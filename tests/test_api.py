"""What `import megam3` offers: loaded on use, and two trainings in one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megam3.errors import ConfigError
from megam3.obs.metrics import read_metrics
from tests.launches import make_workplace

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, folder: Path) -> str:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_importing_the_package_loads_nothing_heavy(tmp_path: Path) -> None:
    assert (
        python("import megam3, sys; print({'torch', 'deepspeed'} & set(sys.modules))", tmp_path) == "set()\n"
    )


def test_an_unknown_name_is_an_attribute_error() -> None:
    import megam3

    with pytest.raises(AttributeError, match="module 'megam3' has no attribute 'trian'"):
        megam3.trian  # type: ignore[attr-defined] # noqa: B018


def test_two_trainings_and_an_error_in_one_process(tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    code = """
from megam3 import M3Embedder, train
from megam3.errors import ConfigError
small = ["train.steps=2", "engine.template=zero0"]
first = train("recipe.yaml", "name=first", *small)
try:
    train("recipe.yaml", "name=bad", "optim.lrr=1")
except ConfigError as error:
    print("error:", error)
second = train("recipe.yaml", "name=second", "train.seed=7", *small)
print(first.name, second.name, M3Embedder.__name__)
"""
    out = python(code, tmp_path)
    assert "error: optim.lrr" in out
    assert out.splitlines()[-1] == "first second M3Embedder"
    for name in ("first", "second"):
        rows = read_metrics(place.run(name) / "metrics.jsonl")
        assert [row["step"] for row in rows if "loss/total" in row] == [1, 2]


def test_bad_input_is_raised_and_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from megam3 import train

    with pytest.raises(ConfigError, match="no-such-recipe"):
        train("no-such-recipe")
    assert capsys.readouterr().err == ""
