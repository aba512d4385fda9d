"""The example of docs/export.md for MTEB runs as it stands, on a stand-in that asks of a model what the
library asks; tests/peers runs the same lines in the real one."""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.docs.blocks import ROOT, fences
from tests.factory import make_sentences, make_tiny_model_folder


def stand_in(scores: dict[str, float]) -> tuple[types.ModuleType, types.ModuleType]:
    """`mteb` and `mteb.models` with the few names that the example and MtebModel use."""
    library, models = types.ModuleType("mteb"), types.ModuleType("mteb.models")

    class ModelMeta:
        @classmethod
        def create_empty(cls, fields: dict[str, Any]) -> dict[str, Any]:
            return fields

    def evaluate(model: Any, tasks: list[str], cache: object) -> Any:
        assert cache is None
        texts = make_sentences(8)
        half = [{"text": texts[:4]}, {"text": texts[4:]}]  # in batches, as MTEB's loader hands them over
        passages = model.encode(half, task_metadata=None, hf_split="test", hf_subset="default")
        queries = model.encode([{"text": texts[:3]}], prompt_type="query")
        found = model.similarity(queries, passages).argmax(dim=1).tolist()
        scores.update(
            {task: float(np.mean([place == row for row, place in enumerate(found)])) for task in tasks}
        )
        result = types.SimpleNamespace(get_score=lambda: scores[tasks[0]])
        return types.SimpleNamespace(task_results=[result])

    models.ModelMeta = ModelMeta  # type: ignore[attr-defined]
    library.models, library.evaluate = models, evaluate  # type: ignore[attr-defined]
    library.get_tasks = list  # type: ignore[attr-defined]
    return library, models


def test_the_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores: dict[str, float] = {}
    library, models = stand_in(scores)
    monkeypatch.setitem(sys.modules, "mteb", library)
    monkeypatch.setitem(sys.modules, "mteb.models", models)
    make_tiny_model_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (example,) = (code for code in fences(ROOT / "docs/export.md", "python") if "mteb" in code)
    capsys.readouterr()
    exec(compile(example, "docs/export.md", "exec"), {})
    assert scores == {"NFCorpus": 1.0}  # each query is a copy of its passage
    assert capsys.readouterr().out.splitlines()[-1] == "1.0"
