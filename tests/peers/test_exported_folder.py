"""An exported folder read by the real FlagEmbedding and sentence-transformers, compared with M3Embedder.

They need transformers 4 and so an environment of their own: MEGAM3_PEER_PYTHON names its interpreter.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from megam3.config.schema import ModelConfig
from megam3.embedder import M3Embedder
from megam3.export.bge_m3 import export_bge_m3
from megam3.model.pretrained import load_m3
from tests.factory import make_sentences, make_tiny_model_folder

PEER_PYTHON = os.environ.get("MEGAM3_PEER_PYTHON")

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not PEER_PYTHON, reason="MEGAM3_PEER_PYTHON names no interpreter with FlagEmbedding"),
]


@pytest.mark.parametrize("width", [None, 12])
def test_flagembedding_and_sentence_transformers_read_what_megam3_wrote(tmp_path, width):
    source = make_tiny_model_folder(tmp_path / "source", max_tokens=256, multi_vector_dim=width)
    model = load_m3(str(source), ModelConfig(path=str(source)))
    export_bge_m3(model.state_dict(), str(source), tmp_path / "out")
    texts = [*make_sentences(7, seed=9), "x", " ".join(make_sentences(60, seed=5))]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    script = Path(__file__).with_name("encode_with_peers.py")
    arguments = [tmp_path / "out", tmp_path / "texts.json", tmp_path / "peer.npz", width or -1]
    subprocess.run([PEER_PYTHON, script, *map(str, arguments)], check=True, cwd=tmp_path)

    ours, theirs = M3Embedder(tmp_path / "out", device="cpu").encode(texts), np.load(tmp_path / "peer.npz")
    assert abs(theirs["dense"] - ours.dense_vecs).max() <= 1e-5
    assert abs(theirs["sentence_transformers"] - ours.dense_vecs).max() <= 1e-5
    lexical = json.loads(str(theirs["lexical"]))
    assert len(lexical) == len(texts)
    for wanted, got in zip(lexical, ours.lexical_weights):
        assert got == pytest.approx(wanted, abs=1e-5)
    for n, got in enumerate(ours.colbert_vecs):
        assert got.shape == theirs[f"colbert_{n}"].shape
        assert abs(theirs[f"colbert_{n}"] - got).max() <= 1e-5
