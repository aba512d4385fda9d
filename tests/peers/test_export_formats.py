"""Exports that are run where megam3 itself is imported, each in an environment that a variable names.

    MEGAM3_PEER_PYTHON_ONNX    onnx, onnxscript, onnxruntime, transformers 5, pydantic, ruamel.yaml
    MEGAM3_PEER_PYTHON_MTEB    mteb 2, transformers 5, pydantic, ruamel.yaml
    MEGAM3_PEER_PYTHON_ST6     sentence-transformers 6

`-s` shows the largest differences. Readers that need nothing of megam3 are in test_parity.py.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from megam3.config.schema import ModelConfig
from megam3.embedder import M3Embedder
from megam3.export.formats import export
from megam3.export.imported import import_model
from megam3.model.pretrained import load_tokenizer_of
from tests.export.test_bge_m3 import trained
from tests.factory import make_sentences, make_tiny_model_folder
from tests.peers.test_parity import with_perturbed_heads

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
@pytest.mark.parametrize(
    ("width", "block"),
    [
        (None, {}),
        (12, {}),
        (12, {"multi_vector_hidden": 48}),
        (12, {"multi_vector_hidden": 32, "multi_vector_activation": "tanh"}),
        (12, {"multi_vector_hidden": 16, "multi_vector_activation": "identity"}),
    ],
)
def test_token_vectors_equal_ours(tmp_path, library, name, width, block):
    python = python_of(name)
    source = make_tiny_model_folder(tmp_path / "source", max_tokens=256, multi_vector_dim=width)
    model = trained(source, **block)
    settings = ModelConfig(path=str(source), **block)
    export(model.state_dict(), str(source), tmp_path / "out", format=library, settings=settings)
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
    embedder = M3Embedder.from_model(model, load_tokenizer_of(str(source)))
    for n, rows in enumerate(embedder.encode(texts).colbert_vecs):
        assert theirs[f"rows_{n}"].shape == rows.shape
        worst = max(worst, float(abs(theirs[f"rows_{n}"] - rows).max()))
    print(f"{library}, width {width} {block}: largest difference of the multi-vector head {worst:.2e}")
    assert worst <= 1e-5


@pytest.fixture(params=["tiny", "real"])
def retriever(request, tmp_path):
    """(name, source folder, weights): a perturbed tiny model, and the folder that MEGAM3_PEER_MODEL names."""
    if request.param == "real":
        if "MEGAM3_PEER_MODEL" not in os.environ:
            pytest.skip("MEGAM3_PEER_MODEL names no folder")
        folder = os.environ["MEGAM3_PEER_MODEL"]
        return "real", folder, with_perturbed_heads(folder)
    source = make_tiny_model_folder(tmp_path / "source", max_tokens=256, multi_vector_dim=12)
    return "tiny", str(source), trained(source).state_dict()


def test_onnxruntime_equals_the_packed_model(retriever, tmp_path):
    name, source, state = retriever
    python = python_of("ONNX")
    torch.save(state, tmp_path / "state.pt")
    printed = run_in(python, "export_and_run_onnx.py", tmp_path / "state.pt", source, tmp_path / "out")
    differences = json.loads(printed.splitlines()[-1])
    print(f"\n| onnx | {name} | {differences} |")
    assert max(differences[head] for head in ("dense", "token_weights", "multi_vectors")) <= 1e-4
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


def test_mteb_evaluates_an_exported_folder(retriever, tmp_path):
    name, source, state = retriever
    python = python_of("MTEB")
    export(state, source, tmp_path / "out")
    printed = run_in(python, "run_mteb.py", tmp_path / "out")
    print(f"\n| mteb | {name} | nDCG@10 {printed.splitlines()[-1]} |")
    assert float(printed.splitlines()[-1]) == 1.0


def test_a_model_of_pylate_is_imported_with_its_layers(tmp_path):
    python = python_of("PYLATE")
    source = make_tiny_model_folder(tmp_path / "source", max_tokens=256, heads=False)
    texts = [*make_sentences(5, seed=9), "x"]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    places = [source, tmp_path / "theirs", tmp_path / "texts.json", tmp_path / "rows.npz"]
    run_in(python, "make_pylate_model.py", *places)
    imported = import_model(str(tmp_path / "theirs"), tmp_path / "start")
    assert imported.heads == ("multi_vector",)
    theirs, worst = np.load(tmp_path / "rows.npz"), 0.0
    for n, rows in enumerate(M3Embedder(tmp_path / "start", device="cpu").encode(texts).colbert_vecs):
        # PyLate keeps the row of <s>
        assert theirs[f"rows_{n}"].shape == (len(rows) + 1, 8)
        worst = max(worst, float(abs(theirs[f"rows_{n}"][1:] - rows).max()))
    print(f"imported from PyLate: largest difference of the multi-vector head {worst:.2e}")
    assert worst <= 1e-5
