"""Every exported folder in every reader it is written for, number by number beside megam3.

Each reader has an environment of its own, whose interpreter a variable names (a reader without one is
skipped):

    MEGAM3_PEER_PYTHON          FlagEmbedding 1.4.2, transformers 4.57
    MEGAM3_PEER_PYTHON_ST5      sentence-transformers 5.7, transformers 4.57
    MEGAM3_PEER_PYTHON_ST6      sentence-transformers 6, transformers 5
    MEGAM3_PEER_PYTHON_PYLATE   pylate 1.6

The models are a tiny one whose every weight was perturbed, with the multi-vector width of the encoder and
another, and the folder that MEGAM3_PEER_MODEL names (`megam3 export`, `megam3 import --new-heads`): a real
encoder, with its real vocabulary. `-s` prints the largest difference of each head as a row of a table.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

from megam3.config.schema import ModelConfig
from megam3.embedder import M3Embedder
from megam3.export.formats import export
from megam3.export.model_card import CardFacts
from megam3.instructions import Instructions
from megam3.model.m3 import is_head_parameter
from megam3.model.pretrained import load_m3
from tests.export.test_bge_m3 import trained
from tests.factory import make_sentences, make_tiny_model_folder

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5
"""Of fp32 numbers around 1 that other kernels sum in another order."""
pytestmark = pytest.mark.peers


def python_of(name: str) -> str:
    """The interpreter of a reader's environment; skips where none is named."""
    variable = f"MEGAM3_PEER_PYTHON{name}"
    if variable not in os.environ:
        pytest.skip(f"{variable} names no interpreter")
    return os.environ[variable]


def read(reader: str, environment: str, folder: Path, texts: list[str], tmp_path: Path):
    """(arrays, versions) that the reader answers with."""
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = Path(__file__).with_name("read_folder.py")
    command = [python_of(environment), script, reader, folder, tmp_path / "texts.json", tmp_path / "r.npz"]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(tmp_path / "r.npz"), done.stdout.splitlines()[-1]


def judge(name: str, model: str, versions: str, differences: dict[str, float]) -> None:
    """Print a row of the table, and refuse a large difference."""
    shown = ", ".join(f"{head} {value:.1e}" for head, value in differences.items())
    print(f"\n| {name} | {model} | {versions} | {shown} |")
    assert max(differences.values()) <= TOLERANCE


def differences_of_rows(found, ours) -> float:
    """Largest difference of the arrays `rows_0`, `rows_1` …, which have the shapes of `ours`."""
    worst = 0.0
    for n, rows in enumerate(ours):
        assert found[f"rows_{n}"].shape == rows.shape
        worst = max(worst, float(abs(found[f"rows_{n}"] - rows).max(initial=0.0)))
    return worst


def differences_of_dicts(found: list[dict[str, float]], ours: list[dict[str, float]]) -> float:
    """Largest difference of lexical weights; a token on one side only counts with its weight."""
    assert len(found) == len(ours)
    return max(
        abs(theirs.get(token, 0.0) - mine.get(token, 0.0))
        for theirs, mine in zip(found, ours)
        for token in {*theirs, *mine}
    )


SHORT = ["Where is the nearest station?", "東京の人口は何人ですか。", "كم عدد سكان القاهرة؟", "x"]
LONG = " ".join(make_sentences(90, seed=5))
"""Longer than the models take: both sides must cut it at the same token."""


def with_perturbed_heads(folder: str) -> dict[str, torch.Tensor]:
    """Weights of a served folder; heads as training would start them would hide what goes wrong with them."""
    state = load_m3(folder, ModelConfig(path=folder)).state_dict()
    generator = torch.Generator().manual_seed(3)
    for name in filter(is_head_parameter, state):
        state[name] = state[name] + 0.05 * torch.randn(state[name].shape, generator=generator)
    return state


@pytest.fixture(scope="module", params=["tiny", "tiny, width 12", "real"])
def model(request, tmp_path_factory):
    """(name, source folder, weights of the retriever)."""
    if request.param == "real":
        if "MEGAM3_PEER_MODEL" not in os.environ:
            pytest.skip("MEGAM3_PEER_MODEL names no folder")
        folder = os.environ["MEGAM3_PEER_MODEL"]
        return request.param, folder, with_perturbed_heads(folder)
    width = 12 if "width" in request.param else None
    folder = make_tiny_model_folder(
        tmp_path_factory.mktemp("tiny") / "source", max_tokens=256, multi_vector_dim=width
    )
    return request.param, str(folder), trained(folder).state_dict()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    """(name, the bge-m3 folder, what megam3 computes of the texts)."""
    name, source, state = model
    out = tmp_path_factory.mktemp("exported") / "out"
    export(state, source, out)
    return name, out, M3Embedder(str(out), device="cpu").encode([*SHORT, LONG])


def test_flagembedding_reads_all_three_heads(exported, tmp_path):
    name, folder, ours = exported
    found, versions = read("flagembedding", "", folder, [*SHORT, LONG], tmp_path)
    differences = {
        "dense": float(abs(found["dense"] - ours.dense_vecs).max()),
        "lexical": differences_of_dicts(json.loads(str(found["lexical"])), ours.lexical_weights),
        "multi-vector": differences_of_rows(found, ours.colbert_vecs),
    }
    judge("bge-m3", name, versions, differences)


@pytest.mark.parametrize(
    ("reader", "environment"),
    [("dense", "_ST5"), ("dense", "_ST6"), ("auto-model", ""), ("auto-model", "_ST6")],
)
def test_dense_vectors_are_read(exported, tmp_path, reader, environment):
    name, folder, ours = exported
    found, versions = read(reader, environment, folder, [*SHORT, LONG], tmp_path)
    judge(f"bge-m3, {reader}", name, versions, {"dense": float(abs(found["dense"] - ours.dense_vecs).max())})


@pytest.mark.parametrize(
    ("reader", "environment"), [("dense", "_ST5"), ("dense", "_ST6"), ("flagembedding", "")]
)
def test_instructions_are_put_before_texts(model, tmp_path, reader, environment):
    python_of(environment)
    name, source, state = model
    instructions = Instructions(query="query: ", passage="passage: ")
    export(state, source, tmp_path / "out", facts=CardFacts(instructions=instructions))
    embedder = M3Embedder(str(tmp_path / "out"), device="cpu")
    for side, encode in (("query", embedder.encode_queries), ("document", embedder.encode_passages)):
        found, versions = read(f"{reader}-{side}", environment, tmp_path / "out", [*SHORT, LONG], tmp_path)
        ours = encode([*SHORT, LONG], heads=["dense"]).dense_vecs
        judge(
            f"instructions, {reader}-{side}",
            name,
            versions,
            {"dense": float(abs(found["dense"] - ours).max())},
        )


@pytest.mark.parametrize(("reader", "environment"), [("multi-vector", "_ST6"), ("pylate", "_PYLATE")])
def test_token_vectors_are_read(model, exported, tmp_path, reader, environment):
    python_of(environment)
    name, source, state = model
    export(state, source, tmp_path / "out", format=reader)
    found, versions = read(reader, environment, tmp_path / "out", [*SHORT, LONG], tmp_path)
    judge(reader, name, versions, {"multi-vector": differences_of_rows(found, exported[2].colbert_vecs)})


@pytest.fixture(scope="module")
def masked_lm(model, tmp_path_factory):
    """(name, folder of a stock masked-LM model with a perturbed head around the encoder)."""
    name, source, _ = model
    folder = tmp_path_factory.mktemp("mlm") / "source"
    stock = AutoModelForMaskedLM.from_pretrained(source).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for parameter_name, parameter in stock.lm_head.named_parameters():
            if "decoder" not in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    stock.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    piece = Path(source) / "sentencepiece.bpe.model"
    (folder / piece.name).write_bytes(piece.read_bytes())
    return name, str(folder), stock


@pytest.mark.parametrize("environment", ["", "_ST6"])
def test_masked_lm_models_are_read(masked_lm, tmp_path, environment):
    python_of(environment)
    name, source, stock = masked_lm
    state = {k.replace("roberta.", "encoder.", 1): v for k, v in stock.state_dict().items()}
    export(state, source, tmp_path / "out", format="mlm")
    found, versions = read("masked-lm", environment, tmp_path / "out", SHORT, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(source)
    with torch.no_grad():
        ours = [stock(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in SHORT]
    scale = max(float(abs(rows).max()) for rows in ours)
    judge("mlm", name, versions, {"logits / the largest": differences_of_rows(found, ours) / scale})


@pytest.mark.parametrize("environment", ["_ST5", "_ST6"])
def test_sparse_encoder_reads_an_expansion_head(masked_lm, tmp_path, environment):
    python_of(environment)
    name, source, _ = masked_lm
    state = load_m3(
        source, ModelConfig(path=source, lexical_kind="expansion", missing_heads="init")
    ).state_dict()
    export(state, source, tmp_path / "out", format="splade")
    found, versions = read("sparse-encoder", environment, tmp_path / "out", SHORT, tmp_path)
    ours = np.zeros_like(found["lexical"])
    for row, weights in zip(
        ours, M3Embedder(str(tmp_path / "out"), device="cpu").encode(SHORT).lexical_weights
    ):
        row[[int(token) for token in weights]] = list(weights.values())
    assert (ours > 0).any()
    judge("splade", name, versions, {"lexical": float(abs(found["lexical"] - ours).max())})
