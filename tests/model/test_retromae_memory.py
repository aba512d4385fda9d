"""The decoder's memory, counted: nothing is as large as L x L, and what is made grows with the tokens."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig

from megam3.model import cross_attention as cross_attention_module
from megam3.model.backbone import build_backbone
from megam3.model.masked_lm import CHUNK_ROWS, tied_cross_entropy
from megam3.model.masking import order_in_halves
from megam3.model.retromae import RetroMAE
from megam3.packed_texts import pack_stream


class Counted(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns, elements of all, and how many operations."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.total = self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in out if isinstance(out, tuple | list) else [out]:
            # views of the embedding matrix and expanded scalars hold nothing of their own
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.itemsize)
                self.total += tensor.numel()
        return out


def make_model() -> RetroMAE:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=8192,
    )
    return RetroMAE(build_backbone(config), has_decoder=True).eval()


def count_decoder(model: RetroMAE, lengths: tuple[int, ...]) -> Counted:
    """Forward and backward of the decoder alone, over `lengths`."""
    texts = pack_stream(torch.randint(5, 40, (sum(lengths),)), lengths)
    hidden_TD = torch.randn(sum(lengths), 16, requires_grad=True)
    text_T, position_T = texts.text_ids_T(), texts.position_ids_T
    with Counted() as counted:
        order_T = order_in_halves(text_T, text_T, position_T, seed=0, step=0)
        rows, _ = model._decode(
            hidden_TD, texts.input_ids_T, position_T, texts.cu_seqlens_N1, lengths, order_T, 0.5
        )
        rows.sum().backward()
    return counted


def test_the_decoder_makes_tensors_that_grow_with_the_tokens_and_none_of_length_times_length():
    model = make_model()
    short, long = count_decoder(model, (512,)), count_decoder(model, (8192,))
    # the widest row is the intermediate one, 32 numbers; attention alone, L x L per head, would be 2^27
    assert long.largest <= 8192 * 32
    assert long.total <= 16.5 * short.total
    assert long.calls == short.calls


def test_operations_of_the_decoder_do_not_grow_with_the_number_of_texts():
    model = make_model()
    few, many = count_decoder(model, (17,) * 2), count_decoder(model, (17,) * 64)
    # 8 and 8 tokens beside <s>: halves of one size share an attention call, and nothing else looks at a text
    assert many.calls == few.calls


def test_one_fused_call_serves_all_texts_of_a_stream_on_a_gpu(monkeypatch: pytest.MonkeyPatch):
    called: list[tuple[int, ...]] = []

    def stand_in(q, k, v, cu_rows, cu_keys, longest_rows, longest_keys):
        called.append(tuple(q.shape))
        return q + k.sum() + v.sum()

    monkeypatch.setattr(cross_attention_module, "fits_varlen", lambda *_: True)
    monkeypatch.setattr(cross_attention_module, "varlen_attn", stand_in)
    few = count_decoder(make_model(), (9, 2, 14, 9, 300))
    assert called == [(334 - 5, 2, 8)]
    # of any lengths
    assert count_decoder(make_model(), tuple(range(2, 60))).calls == few.calls


def test_logits_of_masked_positions_never_exist_for_all_of_them():
    rows, vocab = 4 * CHUNK_ROWS, 700
    leaves = [torch.randn(shape, requires_grad=True) for shape in ((rows, 8), (vocab, 8), (vocab,))]
    with Counted() as counted:
        tied_cross_entropy(*leaves, torch.zeros(rows, dtype=torch.int64), torch.ones(rows))[0].backward()
    assert counted.largest == CHUNK_ROWS * vocab
