"""The bag-of-words loss in blocks of the vocabulary against whole logits, in float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megam3.model.bag_of_words import bag_of_words_loss, distinct_ids
from megam3.model.expansion import block_width

LENGTHS = (3, 1, 6, 0, 4)
BAGS = ({7, 9}, {10}, {0, 3, 4}, set(), set())
"""The fourth text has no tokens, the fifth no ordinary ids."""


def pairs():
    return tuple(
        torch.tensor(x) for x in zip(*((text, i) for text, bag in enumerate(BAGS) for i in sorted(bag)))
    )


def naive(rows, weight, bias, scale):
    """The formula text by text, as the paper writes it."""
    loss = 0.0
    for part, bag in zip(rows.split(LENGTHS), BAGS):
        if bag:
            pooled = (part @ weight.T + bias).amax(0)
            loss = loss - sum(pooled.log_softmax(0)[i] for i in bag) / len(bag)
    return scale * loss


@pytest.mark.parametrize("block", [1, 4, 11, 100])
def test_loss_and_all_gradients_equal_the_whole_logits(block):
    torch.manual_seed(0)
    rows, weight, bias = torch.randn(14, 5).double(), torch.randn(11, 5).double(), torch.randn(11).double()
    rows[1] = rows[0]  # two tokens reach every maximum of the first text together, or none does
    results = []
    for in_blocks in (True, False):
        leaves = [x.clone().requires_grad_() for x in (rows, weight, bias)]
        if in_blocks:
            loss, losses_N = bag_of_words_loss(*leaves, LENGTHS, *pairs(), 0.7, block)
            torch.testing.assert_close(0.7 * losses_N.sum(), loss.detach(), rtol=1e-12, atol=0)
            assert losses_N[3:].tolist() == [0, 0]
        else:
            loss = naive(*leaves, 0.7)
        (3 * loss).backward()
        results.append([loss.detach(), *(x.grad for x in leaves)])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_bag_holds_every_ordinary_id_of_its_text_once():
    ids, texts = torch.tensor([0, 8, 6, 8, 2, 0, 6, 2]), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    pairs, counts = distinct_ids(ids, texts, ids > 4, 9, 3)
    # the third text has none; behind the last pair stands that text's number and one more
    assert counts.tolist() == [2, 1, 0]
    assert pairs[:, :3].tolist() == [[0, 0, 1], [6, 8, 6]]
    assert pairs[0, 3:].tolist() == [3] * 5


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_holds_tokens_times_vocabulary():
    tokens, vocab, block = 300, 5000, 64
    rows, weight = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocab, 4, requires_grad=True)
    text, ids = torch.zeros(3, dtype=torch.int64), torch.tensor([5, 6, 7])
    with Largest() as largest:
        bag_of_words_loss(rows, weight, torch.zeros(vocab), (tokens,), text, ids, 1.0, block)[0].backward()
    assert largest.elements == max(tokens * block, vocab * 4)
    # what is used without a block: no more than 128 MB in fp32, unless that would make blocks narrow
    assert 8192 * block_width(8192) == 1 << 25
