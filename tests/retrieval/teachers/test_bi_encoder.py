"""Bi-encoder teachers: a megam3 folder's own scores, a sentence-transformers folder against a plain loop."""

import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from megam3.embedder import M3Embedder
from megam3.errors import CheckpointError, ConfigError
from megam3.retrieval.teachers.bi_encoder import DenseTeacher, M3Teacher
from tests.factory import make_sentences, make_tiny_model_folder

TEXTS = make_sentences(9, seed=6, min_words=2, max_words=20)
PAIRS = [(TEXTS[n % 3], TEXTS[n]) for n in range(9)]


def make_folder(folder, pooling, normalize=True, module="Pooling"):
    make_tiny_model_folder(folder, heads=False, max_tokens=64)
    kinds = [
        ("", "Transformer"),
        ("1_Pooling", module),
        *([("2_Normalize", "Normalize")] if normalize else []),
    ]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return str(folder)


@pytest.mark.parametrize(
    ("pooling", "name"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_lasttoken": True}, "last"),
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_scores_are_those_of_one_text_at_a_time(tmp_path, pooling, name, normalize):
    folder = make_folder(tmp_path, pooling, normalize)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    vectors = {}
    for text in TEXTS:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        vector = {"cls": hidden[0], "mean": hidden.mean(0), "last": hidden[-1]}[name]
        vectors[text] = vector / vector.norm() if normalize else vector
    wanted = [float(vectors[q] @ vectors[p]) for q, p in PAIRS]
    got = DenseTeacher(folder, device="cpu", batch_tokens=60).score(PAIRS)
    assert got.tolist() == pytest.approx(wanted, rel=1e-4, abs=1e-4)


def test_a_limit_beyond_the_positions_is_refused(tmp_path):
    folder = make_folder(tmp_path, {"pooling_mode": "mean"})
    assert DenseTeacher(folder, device="cpu", max_tokens=64).score([("a", "b " * 200)]).shape == (1,)
    for limit in (65, 0):
        with pytest.raises(ConfigError, match=f"--max-tokens = {limit}: must be between 3 and 64, what the"):
            DenseTeacher(folder, device="cpu", max_tokens=limit)
    # a folder that promises more than its encoder reads
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "model_max_length": 512}))
    assert DenseTeacher(folder, device="cpu").max_tokens == 64


def test_a_module_that_is_not_read_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has a module Dense, which is not read here"):
        DenseTeacher(make_folder(tmp_path, {}, module="Dense"), device="cpu")


@pytest.mark.parametrize(
    "pooling",
    [
        {"pooling_mode_max_tokens": True},
        {},
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True},
    ],
)
def test_a_pooling_that_is_not_read_is_refused(tmp_path, pooling):
    with pytest.raises(CheckpointError, match="known are cls, mean, lasttoken"):
        DenseTeacher(make_folder(tmp_path, pooling), device="cpu")


def test_a_folder_without_pooling_is_refused(tmp_path):
    folder = make_folder(tmp_path, {})
    (tmp_path / "modules.json").write_text("[]")
    with pytest.raises(CheckpointError, match="has no Pooling module"):
        DenseTeacher(folder, device="cpu")


def test_a_megam3_folder_scores_by_a_head(tmp_path):
    folder = str(make_tiny_model_folder(tmp_path, max_tokens=64))
    wanted = M3Embedder(folder, device="cpu").score(PAIRS)
    for head in ("dense", "lexical", "multi_vector", "sum"):
        got = M3Teacher(folder, head, device="cpu").score(PAIRS)
        assert got.tolist() == pytest.approx(wanted[head].tolist(), abs=1e-5)
    with pytest.raises(
        ConfigError, match="--head = 'sparse': must be one of dense, lexical, multi_vector, sum"
    ):
        M3Teacher(folder, "sparse", device="cpu")
