"""The expansion head against N × L × V logits, in float64; its memory; its weights beside transformers' own
masked-LM model."""

import pytest
import torch

from megam3.model.expansion import expand, heaviest

LENGTHS = (3, 1, 5, 2)
SPECIAL = (0, 2, 9)
VOCABULARY, WIDTH = 23, 4


def _inputs(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(LENGTHS), WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def _naive(rows, weight, bias, top_k=None) -> torch.Tensor:
    """[N, V] by whole logits, as the peers form them."""
    texts = []
    for part in rows.split(LENGTHS):
        best = torch.log1p(torch.relu(part @ weight.T + bias)).amax(0)
        allowed = torch.ones_like(best)
        allowed[list(SPECIAL)] = 0.0
        best = best * allowed
        if top_k is not None:
            best = best * torch.zeros_like(best).scatter(0, best.topk(top_k).indices, 1.0)
        texts.append(best)
    return torch.stack(texts)


def _dense(pairs) -> torch.Tensor:
    counts = pairs.offsets_N1.diff()
    text_Z = torch.arange(len(LENGTHS)).repeat_interleave(counts)
    whole = torch.zeros(len(LENGTHS), VOCABULARY, dtype=torch.float64)
    return whole.index_put((text_Z, pairs.ids_Z), pairs.weights_Z)


@pytest.mark.parametrize("block", [1, 4, 23, 100])
@pytest.mark.parametrize("top_k", [None, 3])
def test_weights_and_gradients_equal_whole_logits(block, top_k):
    inputs = _inputs()
    pairs = expand(*inputs, LENGTHS, SPECIAL, top_k=top_k, block=block)
    ours, theirs = _dense(pairs), _naive(*inputs, top_k)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-14)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad((theirs * upstream).sum(), inputs)
    for grad, wanted in zip(torch.autograd.grad((ours * upstream).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-12, atol=1e-13)


def test_pairs_are_above_zero_ascending_and_never_special():
    pairs = expand(*_inputs(), LENGTHS, SPECIAL, block=5)
    assert (pairs.weights_Z > 0).all()
    assert not set(pairs.ids_Z.tolist()) & set(SPECIAL)
    for start, stop in zip(pairs.offsets_N1.tolist(), pairs.offsets_N1.tolist()[1:]):
        ids = pairs.ids_Z[start:stop].tolist()
        assert ids == sorted(set(ids))


def test_no_text_and_no_word_above_zero():
    rows, weight, bias = _inputs()
    nothing = expand(rows[:0], weight, bias, (), SPECIAL)
    assert (nothing.weights_Z.shape, nothing.offsets_N1.tolist()) == ((0,), [0])
    dead = expand(rows * 0, weight, bias * 0 - 1, LENGTHS, SPECIAL)
    assert (dead.weights_Z.shape, dead.offsets_N1.tolist()) == ((0,), [0, 0, 0, 0, 0])
    dead.weights_Z.sum().backward()
    assert not rows.grad.any()


def test_the_heaviest_pairs_of_each_text_stay_in_order():
    weights, text = torch.tensor([1.0, 3.0, 2.0, 5.0, 5.0, 5.0]), torch.tensor([0, 0, 0, 2, 2, 2])
    assert heaviest(weights, text, 3, 2).tolist() == [1, 2, 3, 4]
    assert heaviest(weights, text, 3, 9).tolist() == [0, 1, 2, 3, 4, 5]


class _LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Elements of the largest tensor that any operation inside makes."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else [made]:
            if isinstance(x, torch.Tensor):
                self.most = max(self.most, x.numel())
        return made


def test_no_tensor_of_tokens_by_vocabulary_is_ever_made():
    lengths, vocabulary = (40, 60), 5000
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(100, 8, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, 8, generator=generator).requires_grad_()
    bias = torch.full((vocabulary,), -6.0, requires_grad=True)
    with _LargestTensor() as seen:
        expand(rows, weight, bias, lengths, SPECIAL, block=50).weights_Z.sum().backward()
    # the embedding matrix's gradient is the largest; T × V would be 500 000
    assert seen.most == vocabulary * 8
