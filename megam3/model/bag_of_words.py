"""DupMAE's second decoding task (arXiv 2211.08769, section 2.3; 2305.02564): the hidden states of a text's
ordinary tokens, pooled, must tell which words the text holds.

    μ(v) = max over tokens i but <s> of ⟨h'_i, E_v⟩ + b_v,    h' = layer_norm(gelu(dense(h)))
    loss(text) = −(1 / |S|) Σ_{v ∈ S} log softmax(μ)(v),      S = distinct ordinary ids of the whole text

The projection of the paper is the tied masked-LM head here, as in its authors' code. Two texts with
S = {7, 9} and {7} are the pairs

    text_Z 0 0 1    id_Z 7 9 7

The softmax runs over the vocabulary, so every id of every text has a gradient, which goes to the token that
won it. The vocabulary goes through in blocks, twice: once for the maxima and the log-sum-exp, once for the
gradients, which are formed in the forward pass for the reasons in `megam3.model.masked_lm`. Memory is
T × block, N × block and an fp32 gradient of the embedding matrix; cost 8·T·V·D operations, a third more than
whole logits would take, for the logits that are not kept.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megam3.dist import comm
from megam3.model.expansion import block_width
from megam3.model.masking import sum_by_text


class _BagOfWords(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        lengths_N: Tensor,
        text_Z: Tensor,
        id_Z: Tensor,
        scale: float,
        block: int,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(rows_TD.dtype, torch.float32)
        num_texts = lengths_N.shape[0]
        # not bincount, which asks the device for the largest text before it counts
        size_N = text_Z.new_zeros(num_texts).index_add_(0, text_Z, torch.ones_like(text_Z))
        share_Z = (1.0 / size_N.to(wide))[text_Z]
        logsum_N = rows_TD.new_full((num_texts,), -torch.inf, dtype=wide)
        told_N = rows_TD.new_zeros(num_texts, dtype=wide)
        for _, best_Nv, bag_Nv, _ in _blocks(
            rows_TD, weight_VD, bias_V, lengths_N, text_Z, id_Z, share_Z, block
        ):
            logsum_N = torch.logaddexp(logsum_N, best_Nv.logsumexp(1))
            told_N += (bag_Nv * best_Nv).sum(1)
            # here and below: else a block's logits, 128 MB, would live on beside the next one's
            del best_Nv, bag_Nv, _
        has_bag_N = size_N > 0
        losses_N = torch.where(has_bag_N, logsum_N - told_N, 0.0)
        text_T = torch.repeat_interleave(lengths_N, output_size=rows_TD.shape[0])
        grad_TD = torch.zeros_like(rows_TD, dtype=wide)
        grad_VD = torch.zeros_like(weight_VD, dtype=wide)
        grad_V = torch.zeros_like(bias_V, dtype=wide)
        weight_N1 = (scale * has_bag_N.to(wide)).unsqueeze(1)
        for first, best_Nv, bag_Nv, logits_Tv in _blocks(
            rows_TD, weight_VD, bias_V, lengths_N, text_Z, id_Z, share_Z, block
        ):
            # d(loss)/dμ, then shared by the tokens that reach the maximum, as amax does: in bf16 they are
            # often several
            grad_Nv = ((best_Nv - logsum_N.unsqueeze(1)).exp() - bag_Nv) * weight_N1
            won_Tv = (logits_Tv == best_Nv[text_T]).to(wide)
            count_Nv = torch.zeros_like(best_Nv).index_add_(0, text_T, won_Tv).clamp_(min=1)
            grad_Tv = won_Tv.mul_((grad_Nv / count_Nv)[text_T]).to(rows_TD.dtype)
            part = slice(first, first + block)
            grad_TD += grad_Tv @ weight_VD[part]
            grad_VD[part] = grad_Tv.T @ rows_TD
            grad_V[part] = grad_Nv.sum(0)
            del best_Nv, bag_Nv, logits_Tv, won_Tv, grad_Tv
        ctx.save_for_backward(grad_TD, grad_VD, grad_V)
        ctx.dtypes = rows_TD.dtype, weight_VD.dtype, bias_V.dtype
        ctx.mark_non_differentiable(losses_N)
        return scale * losses_N.sum(), losses_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = ((saved * grad).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes))
        return *scaled, None, None, None, None, None


def _blocks(
    rows_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    lengths_N: Tensor,
    text_Z: Tensor,
    id_Z: Tensor,
    share_Z: Tensor,
    block: int,
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Per block of the vocabulary: its first id, the maxima [N, v], the bag's shares [N, v] and the logits
    [T, v]."""
    # a text without tokens has no maximum: the lowest number keeps its (unused) sums finite
    lowest = torch.finfo(share_Z.dtype).min
    for first in range(0, weight_VD.shape[0], block):
        part = slice(first, first + block)
        logits_Tv = torch.addmm(bias_V[part], rows_TD, weight_VD[part].T).to(share_Z.dtype)
        # unsafe: the lengths, which the host has checked, are not read back from the device for every block
        best_Nv = torch.segment_reduce(
            logits_Tv, "max", lengths=lengths_N, axis=0, initial=lowest, unsafe=True
        )
        # pairs outside the block add 0 in its first column: the host need not know how many are inside
        inside_Z = (id_Z >= first) & (id_Z < first + best_Nv.shape[1])
        bag_Nv = torch.zeros_like(best_Nv).index_put_(
            (text_Z, torch.where(inside_Z, id_Z - first, 0)), share_Z * inside_Z, accumulate=True
        )
        yield first, best_Nv, bag_Nv, logits_Tv
        del best_Nv, bag_Nv, logits_Tv


def bag_of_words_loss(
    rows_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    lengths: Sequence[int],
    text_Z: Tensor,
    id_Z: Tensor,
    scale: float,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """scale · Σ over texts of the bag-of-words loss, and each text's unscaled loss [N] without a graph; a
    text without ids has loss 0.

    Args:
        rows_TD: h' of all tokens that are pooled.
        lengths: pooled tokens of each text, on the host; they add up to T.
        text_Z, id_Z: the distinct ids of each text (`distinct_ids`).
        block: vocabulary entries at a time; None: `block_width`.
    """
    assert sum(lengths) == rows_TD.shape[0], "every row belongs to a text"
    lengths_N = comm.copy_pinned(torch.tensor(lengths, dtype=torch.int64), rows_TD.device)
    block = block or block_width(rows_TD.shape[0])
    return _BagOfWords.apply(rows_TD, weight_VD, bias_V, lengths_N, text_Z, id_Z, scale, block)


def distinct_ids(
    input_ids_T: Tensor, text_ids_T: Tensor, ordinary_T: Tensor, vocab_size: int, num_texts: int
) -> tuple[Tensor, Tensor]:
    """[2, T] with text and id of every distinct (text, ordinary id), ascending, and how many each text has
    [N].

    Only the device knows how many there are, so there is a column for each token; those past the last pair
    hold text N.
    """
    last = num_texts * vocab_size
    keys_T = torch.where(ordinary_T, text_ids_T * vocab_size + input_ids_T, last).sort().values
    keys_T[1:] = torch.where(keys_T[1:] == keys_T[:-1], last, keys_T[1:])
    keys_T = keys_T.sort().values
    pairs_2T = torch.stack([keys_T // vocab_size, keys_T % vocab_size])
    counts_N1 = sum_by_text(keys_T < last, pairs_2T[0], num_texts + 1)
    return pairs_2T, counts_N1[:num_texts]
