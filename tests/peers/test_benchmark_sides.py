"""What `python -m benchmarks gpu` times of other libraries is the step or the product that its row names:
every such piece in its CPU form, and the loss of its first step beside one written out here.

The interpreters are those of the benchmark (MEGAM3_BENCH_PYTHON_PYLATE and so on, benchmarks/environments.py;
a library without one is skipped). On a CPU MaxSim's kernels need numpy beside triton, for its interpreter.
"""

import math
import os
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from benchmarks.environments import find_python
from benchmarks.gpu.pieces import TINY, Piece, list_pieces
from benchmarks.gpu.runner import run_piece
from benchmarks.models import make_model_folder
from benchmarks.texts import Texts, equal_lengths

pytestmark = pytest.mark.peers
SCALE = 50.0
FIRST_ROW = {"sentence-transformers": 1, "pylate": 0}
"""Of a text's rows: the first token takes part with pylate."""
HAS_BIAS = {"sentence-transformers": 1, "pylate": 0}
PIECES = [piece for piece in list_pieces(1, True, False) if piece.environment]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_model_folder(tmp_path_factory.mktemp("models"), TINY)


def expected_loss(piece: Piece, folder: Path) -> tuple[float, float] | None:
    """Cross-entropy of each query over all passages, at a temperature of 1/SCALE, and the largest score; None
    where the step has terms of its own."""
    spec = piece.spec
    counts = [spec["num_queries"], spec["num_queries"] * spec["passages_per_query"]]
    lengths = [spec["query_tokens"], spec["passage_tokens"]]
    texts = Texts(*map(equal_lengths, counts, lengths), TINY.vocab_size).as_json()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = torch.arange(counts[0]) * spec["passages_per_query"]
    if "SPLADE" in piece.name:
        torch.manual_seed(0)
        model = AutoModelForMaskedLM.from_pretrained(folder)
        with torch.no_grad():
            query_QV, passage_PV = (
                model(**tokenizer(texts[side], return_tensors="pt")).logits.relu().log1p().amax(1)
                for side in ("queries", "passages")
            )
        # its weights of the FLOPS regulariser (arXiv 2004.05665): 5e-5 for queries, 3e-5 for passages
        flops = 5e-5 * query_QV.mean(0).square().sum() + 3e-5 * passage_PV.mean(0).square().sum()
        scores_QP = SCALE * query_QV @ passage_PV.T
        return (cross_entropy(scores_QP, labels) + flops).item(), scores_QP.max().item()
    encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    with torch.no_grad():
        hidden = [
            encoder(**tokenizer(texts[side], return_tensors="pt")).last_hidden_state
            for side in ("queries", "passages")
        ]
    if "dense" in piece.name:
        query_QD, passage_PD = (normalize(part[:, 0], dim=-1) for part in hidden)
        scores_QP = query_QD @ passage_PD.T
    elif "multi-vector" in piece.name:
        head = torch.load(folder / "colbert_linear.pt", weights_only=True)
        first = FIRST_ROW[piece.environment]
        query, passage = (
            normalize(part @ head["weight"].T + head["bias"] * HAS_BIAS[piece.environment], dim=-1)[:, first:]
            for part in hidden
        )
        scores_QP = torch.einsum("qac,pbc->qpab", query, passage).amax(-1).sum(-1)
        if piece.environment == "sentence-transformers":
            scores_QP = scores_QP / query.shape[1]
    else:
        return None
    return cross_entropy(SCALE * scores_QP, labels).item(), SCALE * scores_QP.max().item()


@pytest.mark.parametrize("piece", PIECES, ids=lambda piece: piece.name)
def test_the_piece_runs_and_computes_what_its_name_says(piece, folder, monkeypatch):
    if find_python(piece.environment) is None:
        pytest.skip(f"no interpreter has {piece.environment}")
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "2"))
    entry = run_piece(piece, {"device": "cpu", "model_folder": str(folder)})
    assert "failure" not in entry, entry
    figures = entry["figures"]
    if "side" not in piece.spec:
        # scores and gradients are compared inside the piece
        assert min(figures["forward_seconds"], figures["backward_seconds"]) > 0
        return
    expected = expected_loss(piece, folder)
    print(piece.name, figures["loss"], expected)
    if expected is None:
        assert math.isfinite(figures["loss"])
    else:
        loss, largest = expected
        # a library that takes the positive's score from a sum's logarithm rounds both at their own size
        assert figures["loss"] == pytest.approx(loss, rel=1e-4, abs=1e-5 + 2.0**-23 * largest)
