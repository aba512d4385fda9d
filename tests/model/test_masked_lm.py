"""Chunked cross-entropy over tied embeddings against torch's own, in float64."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import XLMRobertaForMaskedLM

from megam3.config.schema import ModelConfig
from megam3.errors import CheckpointError
from megam3.model.backbone import encode_packed
from megam3.model.masked_lm import MaskedLMHead, fill_lm_head, tied_cross_entropy
from megam3.model.retromae import load_retromae
from megam3.packed_texts import pack_texts
from tests.factory import tiny_config


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
def test_loss_and_all_gradients_equal_the_whole_logits(chunk_rows):
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(7, 5).double(), torch.randn(11, 5).double(), torch.randn(11).double()
    targets, scale = torch.randint(11, (7,)), torch.rand(7).double()
    results = []
    for chunked in (True, False):
        leaves = [x.clone().requires_grad_() for x in (rows, weight, bias)]
        if chunked:
            loss, _ = tied_cross_entropy(*leaves, targets, scale, chunk_rows)
        else:
            logits = leaves[0] @ leaves[1].T + leaves[2]
            loss = (cross_entropy(logits, targets, reduction="none") * scale).sum()
        (3 * loss).backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_rows_give_zero_and_zero_gradients():
    weight = torch.randn(11, 5, requires_grad=True)
    rows = torch.zeros(0, 5, requires_grad=True)
    loss, losses = tied_cross_entropy(rows, weight, torch.zeros(11), torch.zeros(0).long(), torch.zeros(0))
    loss.backward()
    assert loss == 0
    assert losses.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros(11, 5))


def published(folder, as_bin: bool) -> XLMRobertaForMaskedLM:
    """A masked LM of transformers with a head that is nowhere at its initial values, saved in `folder`."""
    torch.manual_seed(3)
    model = XLMRobertaForMaskedLM(tiny_config(60)).eval()
    for parameter in model.lm_head.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    if as_bin:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return model


@pytest.mark.parametrize("as_bin", [True, False])
def test_a_published_head_predicts_as_in_transformers(tmp_path, caplog, as_bin):
    theirs = published(tmp_path, as_bin)
    ours = load_retromae(
        str(tmp_path), ModelConfig(path=str(tmp_path)), has_decoder=False, dtype=torch.float32
    ).eval()
    ids = [0, 7, 31, 59, 4, 2]
    texts = pack_texts([ids])
    with torch.no_grad():
        stream = (texts.input_ids_T, texts.position_ids_T, texts.cu_seqlens_N1, texts.lengths)
        rows, bias = ours.lm_head(encode_packed(ours.encoder, *stream))
        logits = rows @ ours.encoder.get_input_embeddings().weight.T + bias
        expected = theirs(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert "lm_head" not in caplog.text


def test_a_folder_without_head_is_a_warning(tmp_path, caplog):
    save_file({"embeddings.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    head = MaskedLMHead(4, 10, 1e-5)
    before = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        fill_lm_head(head, tmp_path)
    assert f"model.path = {tmp_path}: holds no lm_head, so the masked-LM head starts at random" in caplog.text
    assert all(torch.equal(before[name], tensor) for name, tensor in head.state_dict().items())


def test_a_head_of_other_sizes_or_a_damaged_file_is_an_error(tmp_path):
    torch.save({"lm_head.bias": torch.zeros(10)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"its lm_head is .*'bias': \(10,\).*, the model needs"):
        fill_lm_head(MaskedLMHead(4, 10, 1e-5), tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*cannot be read .*; save it again"):
        fill_lm_head(MaskedLMHead(4, 10, 1e-5), tmp_path)
