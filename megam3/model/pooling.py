"""One row a text out of a packed stream: first token, mean, several first tokens, last token. Pure functions.

text of 5 tokens, mcls every 2       <s> a b c </s>   ->   <s> a <s> b c <s> </s>
                                                           the mean of its three <s>
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megam3.dist import comm
from megam3.model.rows import select_unique_rows
from megam3.reading import Reading


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What the encoder reads: a packed stream, and where the text's own tokens and its `<s>` stand in it."""

    input_ids_T: Tensor
    position_ids_T: Tensor
    cu_seqlens_N1: Tensor
    lengths: tuple[int, ...]
    own_T: Tensor | None = None
    """int64, place of each token of the text itself; None: no token was put in."""
    cls_S: Tensor | None = None
    """int64, places of all `<s>` of all texts, in order; None where none was put in."""
    cls_counts_N: Tensor | None = None
    """int64, how many `<s>` each text has."""


def insert_cls(
    input_ids_T: Tensor,
    position_ids_T: Tensor,
    cu_seqlens_N1: Tensor,
    lengths: tuple[int, ...],
    *,
    reading: Reading,
    cls_id: int | None,
) -> Stream:
    """The stream with `<s>` put before every `cls_every_tokens`-th token of a text (`mcls`), else as it is.

    All sizes follow from `lengths`, which the host knows: the device is not waited for.
    """
    inserted = [reading.inserted(length) for length in lengths]
    if reading.pooling != "mcls":
        return Stream(
            input_ids_T=input_ids_T,
            position_ids_T=position_ids_T,
            cu_seqlens_N1=cu_seqlens_N1,
            lengths=lengths,
        )
    assert cls_id is not None, "a model with mcls knows the token it puts in"
    every, device = reading.cls_every_tokens, input_ids_T.device
    inserted_N = comm.copy_pinned(torch.tensor(inserted, dtype=torch.int64), device)
    before_N = inserted_N.cumsum(0) - inserted_N
    lengths_N = (cu_seqlens_N1[1:] - cu_seqlens_N1[:-1]).long()
    # token at offset o of its text follows o // every tokens put into it, and all those of earlier texts
    before_T = before_N.repeat_interleave(lengths_N, output_size=input_ids_T.shape[0])
    moved_T = before_T + position_ids_T // every
    own_T = torch.arange(input_ids_T.shape[0], device=device) + moved_T
    num_cls = sum(inserted) + len(lengths)
    counts_N = inserted_N + 1
    first_S = (counts_N.cumsum(0) - counts_N).repeat_interleave(counts_N, output_size=num_cls)
    nth_S = torch.arange(num_cls, device=device) - first_S
    start_N = cu_seqlens_N1[:-1].long() + before_N
    # the first is the text's own; the i-th put in stands just before the token at offset i * every
    cls_S = start_N.repeat_interleave(counts_N, output_size=num_cls)
    cls_S = cls_S + nth_S * (every + 1) - (nth_S > 0).long()
    total = input_ids_T.shape[0] + sum(inserted)
    ids = input_ids_T.new_full((total,), cls_id).index_copy_(0, own_T, input_ids_T)
    new_lengths_N = lengths_N + inserted_N
    starts_T = start_N.repeat_interleave(new_lengths_N, output_size=total)
    cu_seqlens = torch.cat([cu_seqlens_N1.new_zeros(1), new_lengths_N.cumsum(0).to(cu_seqlens_N1.dtype)])
    return Stream(
        input_ids_T=ids,
        position_ids_T=(torch.arange(total, device=device) - starts_T).to(position_ids_T.dtype),
        cu_seqlens_N1=cu_seqlens,
        lengths=tuple(length + more for length, more in zip(lengths, inserted)),
        own_T=own_T,
        cls_S=cls_S,
        cls_counts_N=counts_N,
    )


class _SegmentMean(torch.autograd.Function):
    """Mean of neighbouring rows. Written out, because torch's segment_reduce keeps its input for the backward
    pass, and in fp32 that is twice the hidden states of the whole stream."""

    @staticmethod
    def forward(ctx, rows_TD: Tensor, lengths_N: Tensor) -> Tensor:
        ctx.save_for_backward(lengths_N)
        ctx.num_rows, ctx.dtype = rows_TD.shape[0], rows_TD.dtype
        precise = rows_TD.to(torch.promote_types(rows_TD.dtype, torch.float32))
        if not lengths_N.shape[0]:
            return precise.new_zeros(0, rows_TD.shape[1])
        # unsafe: the check of the lengths would wait for the device
        return torch.segment_reduce(precise, "mean", lengths=lengths_N, axis=0, unsafe=True)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None]:
        (lengths_N,) = ctx.saved_tensors
        share_ND = grad_ND / lengths_N.clamp_min(1).unsqueeze(1).to(grad_ND.dtype)
        grad_TD = share_ND.to(ctx.dtype).repeat_interleave(lengths_N, dim=0, output_size=ctx.num_rows)
        return grad_TD, None


def mean_rows(rows_TD: Tensor, lengths_N: Tensor) -> Tensor:
    """[N, D], in fp32 at least: the mean of each text's rows; `lengths_N` (int64) sums to T."""
    return _SegmentMean.apply(rows_TD, lengths_N)


def pool_stream(hidden_TD: Tensor, stream: Stream, reading: Reading) -> Tensor:
    """[N, D]: the row of each text that its dense vector is made of, in fp32 at least, not normalised."""
    cu = stream.cu_seqlens_N1.long()
    if stream.cls_S is not None and stream.cls_counts_N is not None:
        return mean_rows(select_unique_rows(hidden_TD, stream.cls_S), stream.cls_counts_N)
    if reading.pooling == "mean":
        return mean_rows(hidden_TD, cu[1:] - cu[:-1])
    rows_ND = select_unique_rows(hidden_TD, cu[1:] - 1 if reading.pooling == "last" else cu[:-1])
    return rows_ND.to(torch.promote_types(hidden_TD.dtype, torch.float32))


def own_rows(hidden_TD: Tensor, stream: Stream) -> Tensor:
    """The hidden states of the texts' own tokens, which the other heads read."""
    return hidden_TD if stream.own_T is None else select_unique_rows(hidden_TD, stream.own_T)
