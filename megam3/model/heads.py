"""What the three heads read from the hidden states of a packed stream (arXiv 2402.03216, section 3.2). Pure
functions, no padding.

    text 0: <s> a b a </s>     dense         normalize(H[<s>])
                               lexical       {a: max of both a's, b: ...}; special tokens are left out
                               multi-vector  one row each for a, b, a, </s>

Memory is linear in T: distinct (text, id) pairs take the place of an N × L × V tensor.

Precision: under bf16 the projections run in bf16. Dense vectors (N rows) and lexical weights (one number a
token) leave in fp32, which costs next to nothing and keeps scores apart that differ by less than bf16's 3
digits. Multi-vector rows are as many as tokens: their norm is taken in fp32, but they leave in the model's
dtype, which halves what MaxSim keeps and moves.
"""

import torch
from torch import Tensor

from megam3.model.rows import select_unique_rows

_NORM_FLOOR = 1e-12  # as torch.nn.functional.normalize


def normalize_rows(rows: Tensor) -> Tensor:
    """L2-normalise the last dimension; the norm is taken in fp32 at least, the result keeps the dtype."""
    precise = torch.promote_types(rows.dtype, torch.float32)
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=precise).clamp_min(_NORM_FLOOR)
    return (rows / norm).to(rows.dtype)


def dense_vectors(hidden_TD: Tensor, cu_seqlens_N1: Tensor) -> Tensor:
    """[N, D]: the normalised hidden state of each text's first token, in fp32 at least."""
    first_ND = select_unique_rows(hidden_TD, cu_seqlens_N1[:-1].long())
    return normalize_rows(first_ND.to(torch.promote_types(hidden_TD.dtype, torch.float32)))


def lexical_weights(logits_T: Tensor, pair_T: Tensor, num_pairs: int) -> Tensor:
    """[Z]: max over a pair's tokens of relu(logit), in fp32 at least. The gradient goes to the arg-max; equal
    tokens share it evenly.

    Args:
        pair_T: 1 + the pair each token feeds, 0 for special tokens (`LexicalPairs.pair_T`).
        num_pairs: Z, known on the host.
    """
    weights_T = torch.relu(logits_T.to(torch.promote_types(logits_T.dtype, torch.float32)))
    # special tokens fall into one spare bucket at the start
    weights = weights_T.new_zeros(num_pairs + 1).scatter_reduce(
        0, pair_T, weights_T, "amax", include_self=True
    )
    return weights[1:]


def multi_vector_rows(projected_TC: Tensor, cu_seqlens_N1: Tensor) -> tuple[Tensor, Tensor]:
    """([K, C], [N + 1]): normalised rows of every token but each text's first, K = T - N, and the offsets of
    each text's rows."""
    num_texts = cu_seqlens_N1.shape[0] - 1
    num_rows = projected_TC.shape[0] - num_texts
    offsets_N1 = cu_seqlens_N1.long() - torch.arange(num_texts + 1, device=cu_seqlens_N1.device)
    counts_N = offsets_N1[1:] - offsets_N1[:-1]
    texts_before_K = torch.repeat_interleave(
        torch.arange(num_texts, device=counts_N.device), counts_N, output_size=num_rows
    )
    index_K = torch.arange(num_rows, device=counts_N.device) + texts_before_K + 1
    return normalize_rows(select_unique_rows(projected_TC, index_K)), offsets_N1
