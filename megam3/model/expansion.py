"""Lexical weights over the whole vocabulary: max-pooled masked-LM logits (SPLADE-max, arXiv 2109.10086,
equation 5), from a packed stream and without any tensor T × V or N × L × V.

    w(text, v) = max over tokens t of log(1 + relu(⟨h'_t, E_v⟩ + b_v)),    h' = layer_norm(gelu(dense(h)))

log(1 + relu(x)) never falls, so the maximum is taken of the logits. The vocabulary goes through in blocks:
the logits of one block, [T, block], are reduced to [N, block] and forgotten. What is kept are the pairs above
zero, (text, id, token that won): the form in which the token weights of arXiv 2402.03216 are scored, gathered
and cached too, so scores, tiles, ranks and the gradient cache know nothing of this file.

Two texts of 2 tokens, vocabulary 3, logits [.2 -1 0] [.1 -2 3] | [-1 -1 -1] [-2 .5 -3]:

    pairs       (text 0, id 0, token 0, .2) (text 0, id 2, token 1, 3.) | (text 1, id 1, token 3, .5)

The backward pass needs no logits: the gradient of a pair goes to its winner's row and to the id's embedding.
It is laid out block by block, so again as [T, block] at most.

Cost: 2·T·V·D operations forward and twice that backward; memory T × block, N × block, and 3 numbers a pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 1 << 25
"""Logits held at a time, T × block: 128 MB in fp32."""
MIN_BLOCK = 256
"""Fewer columns than this would make the products slow; a stream of 8192 tokens gets 4096."""


@dataclass(frozen=True, kw_only=True)
class ExpandedPairs:
    """The pairs above zero, ascending by text, then id, as `Representations` holds them."""

    weights_Z: Tensor
    ids_Z: Tensor
    offsets_N1: Tensor


def block_width(num_tokens: int) -> int:
    """Vocabulary entries whose logits are formed together."""
    return max(MIN_BLOCK, BLOCK_ELEMENTS // max(1, num_tokens))


@torch.no_grad()
def find_winners(
    rows_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    lengths: Sequence[int],
    special_ids: Sequence[int],
    block: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(text, id, winning token, its logit) of every pair whose best logit is above zero, each [Z], ascending
    by text, then id; one of equal tokens wins. Waits for the device once a block, since only it knows how
    many pairs there are.

    Args:
        rows_TD: what is multiplied by the embedding matrix.
        special_ids: ids that weigh nothing.
        block: vocabulary entries at a time.
    """
    starts = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
    found: list[tuple[Tensor, ...]] = []
    for first in range(0, weight_VD.shape[0], block):
        logits_Tv = torch.addmm(bias_V[first : first + block], rows_TD, weight_VD[first : first + block].T)
        outside = [x - first for x in special_ids if first <= x < first + block]
        # an empty stream has no maximum; it has no pairs either
        best = [logits_Tv[a:b].max(0) for a, b in zip(starts, starts[1:])]
        if not best:
            continue
        best_Nv = torch.stack([values for values, _ in best])
        alive_Nv = best_Nv > 0
        alive_Nv[:, outside] = False
        token_Nv = torch.stack([index + start for (_, index), start in zip(best, starts)])
        text_z, id_z = alive_Nv.nonzero(as_tuple=True)
        found.append((text_z, id_z + first, token_Nv[text_z, id_z], best_Nv[text_z, id_z]))
    if not found:
        none = torch.zeros(0, dtype=torch.int64, device=rows_TD.device)
        return none, none, none, rows_TD.new_zeros(0)
    text_Z, id_Z, token_Z, logits_Z = (torch.cat(part) for part in zip(*found))
    # blocks come one after the other: a stable sort by text leaves ids ascending within it
    order = text_Z.argsort(stable=True)
    return text_Z[order], id_Z[order], token_Z[order], logits_Z[order]


class _PairLogits(torch.autograd.Function):
    """Logit of every pair (token, id) with its gradient, laid out by blocks of the vocabulary.

    One row per pair, Z × D, would be many times T × D.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        logits_Z: Tensor,
        token_Z: Tensor,
        id_Z: Tensor,
        block: int,
    ) -> Tensor:
        # the values are those that `find_winners` saw: they are not computed a second time
        ctx.save_for_backward(rows_TD, weight_VD, token_Z, id_Z)
        ctx.block, ctx.bias_dtype = block, bias_V.dtype
        return logits_Z.to(torch.promote_types(logits_Z.dtype, torch.float32), copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Z: Tensor) -> tuple[Tensor | None, ...]:
        rows_TD, weight_VD, token_Z, id_Z = ctx.saved_tensors
        block, grad_TD = ctx.block, torch.zeros_like(rows_TD)
        grad_VD = torch.zeros_like(weight_VD)
        grad_V = torch.zeros(weight_VD.shape[0], dtype=grad_Z.dtype, device=grad_Z.device)
        grad_V.index_add_(0, id_Z, grad_Z)
        for part, first in _parts(id_Z, weight_VD.shape[0], block):
            weight_vD = weight_VD[first : first + block]
            # a pair is one token and one id: no place is written twice
            grad_Tv = rows_TD.new_zeros(rows_TD.shape[0], weight_vD.shape[0])
            grad_Tv[token_Z[part], id_Z[part] - first] = grad_Z[part].to(rows_TD.dtype)
            grad_TD += grad_Tv @ weight_vD
            grad_VD[first : first + block] = grad_Tv.T @ rows_TD
        return grad_TD, grad_VD, grad_V.to(ctx.bias_dtype), None, None, None, None


def _parts(id_Z: Tensor, num_ids: int, block: int) -> list[tuple[Tensor, int]]:
    """Per block of the vocabulary: which pairs have an id in it, and its first id."""
    order = id_Z.argsort(stable=True)
    edges = torch.arange(0, num_ids + block, block, device=id_Z.device)
    counts = torch.searchsorted(id_Z[order], edges).tolist()
    return [
        (order[start:stop], index * block)
        for index, (start, stop) in enumerate(zip(counts, counts[1:]))
        if stop > start
    ]


def expand(
    rows_TD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor,
    lengths: Sequence[int],
    special_ids: Sequence[int],
    *,
    top_k: int | None = None,
    block: int | None = None,
) -> ExpandedPairs:
    """Expansion weights of each text; gradients flow to rows, embedding matrix and bias.

    Args:
        rows_TD: hidden states after the masked-LM head's own layers.
        weight_VD, bias_V: embedding matrix and bias of the vocabulary.
        lengths: tokens of each text, on the host.
        special_ids: ids that weigh nothing.
        top_k: keep this many of the heaviest pairs of a text; None: all above zero.
        block: vocabulary entries at a time; None: `block_width`.
    """
    num_texts, block = len(lengths), block or block_width(rows_TD.shape[0])
    text_Z, id_Z, token_Z, best_Z = find_winners(rows_TD, weight_VD, bias_V, lengths, special_ids, block)
    logits_Z = _PairLogits.apply(rows_TD, weight_VD, bias_V, best_Z, token_Z, id_Z, block)
    weights_Z = torch.log1p(torch.relu(logits_Z))
    if top_k is not None:
        kept = heaviest(weights_Z.detach(), text_Z, num_texts, top_k)
        weights_Z, id_Z, text_Z = weights_Z[kept], id_Z[kept], text_Z[kept]
    counts_N = torch.bincount(text_Z, minlength=num_texts)
    offsets_N1 = torch.cat([counts_N.new_zeros(1), counts_N.cumsum(0)])
    return ExpandedPairs(weights_Z=weights_Z, ids_Z=id_Z, offsets_N1=offsets_N1)


def heaviest(weights_Z: Tensor, text_Z: Tensor, num_texts: int, top_k: int) -> Tensor:
    """Places, ascending, of the `top_k` heaviest pairs of each text; of equal ones the lower ids stay."""
    by_weight = weights_Z.argsort(descending=True, stable=True)
    order = by_weight[text_Z[by_weight].argsort(stable=True)]
    counts_N = torch.bincount(text_Z, minlength=num_texts)
    first_Z = (counts_N.cumsum(0) - counts_N)[text_Z[order]]
    rank_Z = torch.arange(order.shape[0], device=order.device) - first_Z
    return order[rank_Z < top_k].sort().values
