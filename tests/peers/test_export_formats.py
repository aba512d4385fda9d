"""Exported folders in the real consumers, each in an environment of its own that a variable names.

MEGAM3_PEER_PYTHON_ST6: sentence-transformers 6 with transformers 5, onnx, onnxscript, onnxruntime, pydantic
and
ruamel.yaml; MEGAM3_PEER_PYTHON_PYLATE: pylate; MEGAM3_PEER_PYTHON_MTEB: mteb with transformers 5. `-s` shows
the largest difference of each.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from megam3.embedder import M3Embedder
from megam3.export.formats import export
from tests.export.test_bge_m3 import trained
from tests.factory import make_sentences, make_tiny_model_folder

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.peers


def python_of(name: str) -> str:
    variable = f"MEGAM3_PEER_PYTHON_{name}"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no interpreter")
    return os.environ[variable]


def run_in(python: str, script: str, *arguments: object) -> str:
    command = [python, str(Path(__file__).with_name(script)), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(("library", "name"), [("multi-vector", "ST6"), ("pylate", "PYLATE")])
@pytest.mark.parametrize("width", [None, 12])
def test_token_vectors_equal_ours(tmp_path, library, name, width):
    python = python_of(name)
    source = make_tiny_model_folder(tmp_path / "source", max_tokens=256, multi_vector_dim=width)
    state = trained(source).state_dict()
    export(state, str(source), tmp_path / "ours")
    export(state, str(source), tmp_path / "out", format=library)
    texts = [*make_sentences(7, seed=9), "x", " ".join(make_sentences(60, seed=5))]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    run_in(
        python,
        "encode_token_vectors.py",
        library,
        tmp_path / "out",
        tmp_path / "texts.json",
        tmp_path / "r.npz",
    )
    theirs = np.load(tmp_path / "r.npz")
    worst = 0.0
    for n, rows in enumerate(M3Embedder(tmp_path / "ours", device="cpu").encode(texts).colbert_vecs):
        assert theirs[f"rows_{n}"].shape == rows.shape
        worst = max(worst, float(abs(theirs[f"rows_{n}"] - rows).max()))
    print(f"{library}, width {width}: largest difference of the multi-vector head {worst:.2e}")
    assert worst <= 1e-5


def test_onnxruntime_equals_the_packed_model(tmp_path):
    python = python_of("ST6")
    source = make_tiny_model_folder(tmp_path / "source", max_tokens=256, multi_vector_dim=12)
    torch.save(trained(source).state_dict(), tmp_path / "state.pt")
    printed = run_in(python, "export_and_run_onnx.py", tmp_path / "state.pt", source, tmp_path / "out")
    differences = json.loads(printed.splitlines()[-1])
    print(f"onnxruntime: {differences}")
    assert max(differences[name] for name in ("dense", "token_weights", "multi_vectors")) <= 1e-4
    assert (tmp_path / "out" / "model.int8.onnx").stat().st_size > 0


def test_splade_pooling_takes_a_logarithm_so_it_cannot_carry_the_head():
    code = (
        "import torch\n"
        "from sentence_transformers.sparse_encoder.modules import SpladePooling\n"
        "features = {'token_embeddings': torch.tensor([[[2.0]]]), 'attention_mask': torch.ones(1, 1)}\n"
        "print(SpladePooling('max').eval()(features)['sentence_embedding'].item())\n"
    )
    done = subprocess.run([python_of("ST6"), "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(np.log1p(2.0))


def test_mteb_evaluates_an_exported_folder(tmp_path):
    python = python_of("MTEB")
    source = make_tiny_model_folder(tmp_path / "source", max_tokens=256)
    export(trained(source).state_dict(), str(source), tmp_path / "out")
    printed = run_in(python, "run_mteb.py", tmp_path / "out")
    print(f"mteb: nDCG@10 {printed.splitlines()[-1]}")
    assert float(printed.splitlines()[-1]) == 1.0
