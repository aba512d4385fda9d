"""megam3's heads, scores and losses against what FlagEmbedding 1.4.2's own model computed
(make_flagembedding_golden.py)."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megam3.batch import Representations
from megam3.config.objective import UnifiedConfig
from megam3.loss.distillation import TeacherGroups
from megam3.loss.negatives import Negatives
from megam3.loss.settings import resolve_settings
from megam3.loss.unified import unified_loss
from megam3.model.heads import dense_vectors, lexical_weights, multi_vector_rows
from megam3.packed_texts import pack_texts
from megam3.scoring.combine import score_heads

GOLDEN = Path(__file__).parent.parent / "golden" / "flagembedding_unified.safetensors"
SCRIPT = Path(__file__).parent / "make_flagembedding_golden.py"
SPECIAL_IDS = (0, 1, 2, 3)


def _represent(ids, hidden, record, weights):
    texts = pack_texts(ids.tolist())
    hidden_TD, pairs = hidden.flatten(0, 1), texts.with_pairs(SPECIAL_IDS).lexical
    logits_T = torch.nn.functional.linear(hidden_TD, weights["lexical"], record["lexical.bias"]).squeeze(1)
    projected_TC = torch.nn.functional.linear(hidden_TD, weights["multi_vector"], record["multi_vector.bias"])
    multi_KC, multi_offsets_N1 = multi_vector_rows(projected_TC, texts.cu_seqlens_N1)
    return Representations(
        dense_ND=dense_vectors(hidden_TD, texts.cu_seqlens_N1),
        lexical_weights_Z=lexical_weights(logits_T, pairs.pair_T, pairs.ids_Z.shape[0]),
        lexical_ids_Z=pairs.ids_Z,
        lexical_offsets_N1=pairs.offsets_N1,
        multi_KC=multi_KC,
        multi_offsets_N1=multi_offsets_N1,
    )


@pytest.mark.parametrize(
    ("variant", "distill", "teacher"),
    [
        ("plain", False, None),
        ("distill", True, None),
        ("kl_div", False, "kl_div"),
        ("m3_kd_loss", True, "m3_kd_loss"),
    ],
)
def test_total_loss_and_gradients_equal_flagembedding(variant, distill, teacher):
    record = load_file(GOLDEN)
    leaves = {name: record[name].requires_grad_() for name in ("query_hidden", "passage_hidden")}
    weights = {name: record[f"{name}.weight"].requires_grad_() for name in ("multi_vector", "lexical")}
    queries = _represent(record["query_ids"], leaves["query_hidden"], record, weights)
    passages = _represent(record["passage_ids"], leaves["passage_hidden"], record, weights)
    num_queries, group = record["teacher_scores"].shape
    first = group * torch.arange(num_queries)
    hashes = torch.arange(num_queries * group)
    negatives = Negatives(
        positive_column_Q=first,
        group_stop_Q=first + group,
        passage_hash_P=hashes,
        known_positive_hash_QM=hashes[first][:, None],
    )
    settings = resolve_settings(UnifiedConfig(teacher=teacher))
    terms = unified_loss(
        score_heads(queries, passages, settings.sum_weights).by_name(),
        negatives.positive_column_Q,
        negatives.visible(),
        settings,
        1 / num_queries,
        distill,
        TeacherGroups(record["teacher_scores"], *negatives.group_columns()) if teacher else None,
    )
    torch.testing.assert_close(terms.total.detach(), record[f"{variant}.loss"], rtol=1e-12, atol=0)
    terms.total.backward()
    for name, leaf in {
        "query": leaves["query_hidden"],
        "passage": leaves["passage_hidden"],
        **weights,
    }.items():
        assert leaf.grad.abs().max() > 0
        torch.testing.assert_close(leaf.grad, record[f"{variant}.{name}_grad"], rtol=1e-10, atol=1e-10)


@pytest.mark.peers
def test_the_golden_file_is_what_flagembedding_computes(tmp_path):
    python = os.environ.get("MEGAM3_PEER_PYTHON")
    if not python:
        pytest.skip("MEGAM3_PEER_PYTHON names no interpreter with FlagEmbedding 1.4.2")
    subprocess.run(
        [python, str(SCRIPT), str(tmp_path / "again.safetensors")], check=True, capture_output=True
    )
    again, golden = load_file(tmp_path / "again.safetensors"), load_file(GOLDEN)
    assert again.keys() == golden.keys()
    for name, tensor in golden.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-11, atol=1e-11, msg=name)
