"""Exact gradients of a loss over the whole batch, in the memory of one chunk (GradCache, arXiv 2101.06983,
for all heads at once).

    1. encode chunk by chunk without a graph; keep representations, and the random state each chunk started
    from 2. loss over all representations as leaves (global over ranks: negatives, sum, distillation),
    backward to THEIR gradients 3. chunk by chunk again, with the same random state and a graph: backward of Σ
    ⟨representation, its gradient⟩

By the chain rule step 3 adds up exactly the gradients one big pass would give; replaying the random state
makes dropout draw what it drew in step 1. Nothing here knows the engine: it hands in `encode` and `backward`,
and hears from `is_last` when gradients may be reduced.

All ranks run equally many chunks, because under ZeRO-3 every forward and backward pass is a collective. A
rank that is short encodes a
filler text and sends gradients of exactly zero through it: the module's collectives match, and every
parameter receives an exact 0. No text at all (T = 0) would do the same arithmetic, but kernels and hooks are
far better tested on two tokens than on none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from megam3.batch import Representations, join_representations
from megam3.cost import plan_chunks
from megam3.dist import comm
from megam3.packed_texts import LexicalPairs, PackedTexts

Aux = TypeVar("Aux")

FILLER_IDS = (0, 0)
"""Token ids of the filler text: id 0 exists in every vocabulary; two tokens give the multi-vector head a
row."""


@dataclass(frozen=True)
class _RandomState:
    """Generators of the CPU and of the device the chunk runs on."""

    cpu: Tensor
    cuda: Tensor | None
    device: torch.device

    @staticmethod
    def capture(device: torch.device) -> "_RandomState":
        return _RandomState(
            torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None, device
        )

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda, self.device)


def _filler(device: torch.device) -> PackedTexts:
    """One text of FILLER_IDS, made where it is needed: copies of so little would make the host wait."""
    length = len(FILLER_IDS)
    no_pairs = LexicalPairs(
        ids_Z=torch.zeros(0, dtype=torch.int64, device=device),
        offsets_N1=torch.zeros(2, dtype=torch.int64, device=device),
        pair_T=torch.zeros(length, dtype=torch.int64, device=device),
        counts=(0,),
    )
    return PackedTexts(
        input_ids_T=torch.zeros(length, dtype=torch.int64, device=device),
        position_ids_T=torch.arange(length, device=device),
        cu_seqlens_N1=torch.arange(0, length + 1, length, dtype=torch.int32, device=device),
        lengths=(length,),
        lexical=no_pairs,
    )


def _weighted_sum(representations: Representations, gradients: Sequence[Tensor]) -> Tensor:
    """Σ ⟨representation, gradient⟩, whose gradient is `gradients`; in fp32 or wider, so that its own value
    cannot overflow."""
    dtype = torch.promote_types(representations.dense_ND.dtype, torch.float32)
    total = torch.zeros((), dtype=dtype, device=representations.dense_ND.device)
    for value, gradient in zip(representations.floats(), gradients):
        total = total + (value.to(dtype) * gradient.to(dtype)).sum()
    return total


def _single_pass(
    texts: PackedTexts,
    encode: Callable[[PackedTexts], Representations],
    loss: Callable[[Representations], tuple[Tensor, Aux]],
    backward: Callable[[Tensor, bool], None],
) -> Aux:
    """The whole batch at once; a rank without texts encodes the filler and hands none of it to the loss."""
    empty = texts.num_texts == 0
    representations = encode(_filler(texts.input_ids_T.device) if empty else texts)
    value, aux = loss(representations.select(0, 0) if empty else representations)
    if empty:
        value = value + _weighted_sum(
            representations, [torch.zeros_like(x) for x in representations.floats()]
        )
    backward(value, True)
    return aux


def _encode_all(
    chunks: Sequence[PackedTexts], num_real: int, encode: Callable[[PackedTexts], Representations]
) -> tuple[Representations, list[_RandomState]]:
    """Step 1: representations of the real chunks, as leaves, and the random state before every chunk."""
    parts, states = [], []
    for chunk in chunks:
        # before the pass, so that the second one draws the same dropout masks
        states.append(_RandomState.capture(chunk.input_ids_T.device))
        with torch.no_grad():
            parts.append(encode(chunk))
    joined = join_representations(parts[:num_real]) if num_real else parts[0].select(0, 0)
    # leaves: the loss's backward pass ends here, and the encoder has no graph yet
    return joined.with_floats(*(x.detach().requires_grad_() for x in joined.floats())), states


def cached_step(
    texts: PackedTexts,
    chunk_tokens: int | None,
    encode: Callable[[PackedTexts], Representations],
    loss: Callable[[Representations], tuple[Tensor, Aux]],
    backward: Callable[[Tensor, bool], None],
) -> Aux:
    """Run one batch forward and backward; returns what `loss` returned beside its value.

    Args:
        texts: this rank's texts, on the device.
        chunk_tokens: token budget of a chunk; None: one plain pass, no recomputation.
        encode: texts → representations; called with and without gradients enabled.
        loss: representations of ALL texts, in order → (scalar, anything). It may exchange tensors with other
            ranks.
        backward: (scalar, is_last): accumulates parameter gradients; `is_last` marks the step's last call on
            every rank.
    """
    plan = [(0, texts.num_texts)] if texts.num_texts else []
    if chunk_tokens is not None:
        plan = plan_chunks(texts.lengths, chunk_tokens)
    # a rank that fits one chunk must not take the plain pass while others are in chunks: their collectives
    # would not match
    num_chunks = 1 if chunk_tokens is None else max(1, comm.max_over_ranks(len(plan)))
    if num_chunks == 1:
        return _single_pass(texts, encode, loss, backward)

    filler = _filler(texts.input_ids_T.device)
    chunks = [texts.select(start, stop) for start, stop in plan] + [filler] * (num_chunks - len(plan))
    leaves, states = _encode_all(chunks, len(plan), encode)
    after = _RandomState.capture(texts.input_ids_T.device)
    # every rank is in the loss at the same time: it exchanges representations, and its backward pass their
    # gradients
    value, aux = loss(leaves)
    value.backward()
    # a head that no loss reads has no gradient; zeros keep the number of tensors the same on every rank
    floats = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves.floats()]
    # the loss's graph holds score matrices: it goes before the first chunk's graph comes
    del value
    gradients = leaves.with_floats(*floats)

    for index, (chunk, state) in enumerate(zip(chunks, states)):
        state.restore()
        representations = encode(chunk)
        real = index < len(plan)
        wanted = (
            gradients.select(*plan[index]).floats()
            if real
            else [torch.zeros_like(x) for x in representations.floats()]
        )
        backward(_weighted_sum(representations, wanted), index == num_chunks - 1)
    after.restore()
    return aux
