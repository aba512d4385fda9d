"""Which tokens are hidden from the encoder, as a pure function of (seed, step, row): a resumed run masks the
same tokens.

No generator is kept and nothing loops over texts: every token gets a number in [0, 1) by hashing its
coordinates, the words of a text are ranked by the number of their first piece, and words are hidden in that
order until the share is reached. With a share of 0.3, ten ordinary pieces and words of 2, 1, 3, … pieces in
rank order, the first two words (3 pieces) are hidden.

Counts follow the text's length without a cap (whole-word masking of transformers stops at 512 predictions a
text).

Nothing here waits for the device: what is hidden is a flag a token, whose number only the device knows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megam3.dist import comm

_GOLDEN = -7046029254386353131
# splitmix64 (Steele et al. 2014); multipliers as signed 64-bit integers, whose products wrap around
_MIX = (-4658895280553007687, -7723592293110705685)
_WORDS, _KIND, _TOKEN, _HALVES = 1, 2, 3, 4


@dataclass(frozen=True, kw_only=True)
class VocabularyTables:
    """What masking must know of each id, as tensors over the vocabulary."""

    starts_word_V: Tensor
    """bool: the piece begins a word (`▁` in sentencepiece)."""
    special_V: Tensor
    """bool: never hidden, never a random replacement, never decoded."""
    ordinary_ids_R: Tensor
    """int64: the ids that are not special."""
    mask_id: int

    def to(self, device: torch.device) -> "VocabularyTables":
        """The same tables on `device`, by copies that nobody waits for."""
        return VocabularyTables(
            starts_word_V=comm.copy_pinned(self.starts_word_V, device),
            special_V=comm.copy_pinned(self.special_V, device),
            ordinary_ids_R=comm.copy_pinned(self.ordinary_ids_R, device),
            mask_id=self.mask_id,
        )


@dataclass(frozen=True, kw_only=True)
class MaskedTokens:
    """One stream as the encoder reads it."""

    input_ids_T: Tensor
    """The ids with hidden tokens replaced."""
    hidden_T: Tensor
    """bool: tokens whose ids the encoder must tell."""


def vocabulary_tables(pieces: Sequence[str], special_ids: Iterable[int], mask_id: int) -> VocabularyTables:
    """Tables for a vocabulary whose id i is `pieces[i]`; where no piece carries `▁`, every piece is a
    word."""
    special_V = torch.zeros(len(pieces), dtype=torch.bool)
    special_V[torch.tensor([*special_ids, mask_id])] = True
    starts_word_V = torch.tensor([piece.startswith("▁") for piece in pieces])
    if not starts_word_V.any():
        starts_word_V[:] = True
    return VocabularyTables(
        starts_word_V=starts_word_V,
        special_V=special_V,
        ordinary_ids_R=(~special_V).nonzero().squeeze(1),
        mask_id=mask_id,
    )


def hashed_uniform(seed: int, step: int, salt: int, row_T: Tensor, position_T: Tensor) -> Tensor:
    """float64 in [0, 1) per token, a function of the five coordinates alone (splitmix64 over them)."""
    state_T = torch.full_like(row_T, seed)
    for value in (step, salt, row_T, position_T):
        state_T = _mix(state_T + _GOLDEN) + value
    # 52 bits: every such integer is exact in a float64
    return (_mix(state_T + _GOLDEN) & ((1 << 52) - 1)).double() / (1 << 52)


def _mix(x_T: Tensor) -> Tensor:
    # torch shifts int64 arithmetically: the mask clears the copies of the sign
    for shift, factor in ((30, _MIX[0]), (27, _MIX[1])):
        x_T = (x_T ^ ((x_T >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x_T ^ ((x_T >> 31) & ((1 << 33) - 1))


def mask_tokens(
    input_ids_T: Tensor,
    text_ids_T: Tensor,
    row_T: Tensor,
    position_T: Tensor,
    tables: VocabularyTables,
    *,
    num_texts: int,
    share: float,
    replace: tuple[float, float],
    seed: int,
    step: int,
) -> MaskedTokens:
    """Hide whole words that hold `share` of each text's ordinary tokens, rounded up to the word that reaches
    it.

    Args:
        row_T: row of the document each token belongs to; with `position_T` it names the token for ever.
        replace: share of hidden tokens that become `<mask>`, and a random id; the rest keeps its id.
    """
    ordinary_T = ~tables.special_V[input_ids_T]
    starts_T = tables.starts_word_V[input_ids_T] | ~ordinary_T | (position_T == 0)
    starts_T[1:] |= ~ordinary_T[:-1]
    first_T = torch.cummax(torch.where(starts_T, torch.arange(starts_T.shape[0], device=row_T.device), 0), 0)[
        0
    ]
    rank_T = hashed_uniform(seed, step, _WORDS, row_T, position_T)[first_T]
    hidden_T = _first_words(text_ids_T, num_texts, rank_T, first_T, ordinary_T, share)
    kind_T = hashed_uniform(seed, step, _KIND, row_T, position_T)
    any_T = hashed_uniform(seed, step, _TOKEN, row_T, position_T)
    random_T = tables.ordinary_ids_R[(any_T * tables.ordinary_ids_R.shape[0]).long()]
    to_mask, to_random = replace
    replaced_T = torch.where(kind_T < to_mask + to_random, random_T, input_ids_T)
    replaced_T = torch.where(kind_T < to_mask, tables.mask_id, replaced_T)
    return MaskedTokens(input_ids_T=torch.where(hidden_T, replaced_T, input_ids_T), hidden_T=hidden_T)


def _first_words(
    text_ids_T: Tensor, num_texts: int, rank_T: Tensor, first_T: Tensor, ordinary_T: Tensor, share: float
) -> Tensor:
    """Tokens of the words that come first by rank in each text, until `share` of its ordinary tokens is
    reached."""
    # stable sorts, last key first: by text, by rank within it, words together even where two ranks are equal
    order_T = first_T.argsort(stable=True)
    order_T = order_T[rank_T[order_T].argsort(stable=True)]
    order_T = order_T[text_ids_T[order_T].argsort(stable=True)]
    sorted_T = ordinary_T[order_T].long()
    total_N = sum_by_text(ordinary_T, text_ids_T, num_texts)
    before_T = sorted_T.cumsum(0) - sorted_T - (total_N.cumsum(0) - total_N)[text_ids_T[order_T]]
    # what the text had hidden when the word of this token began
    same_T = torch.ones_like(sorted_T, dtype=torch.bool)
    same_T[1:] = first_T[order_T][1:] != first_T[order_T][:-1]
    index_T = torch.arange(same_T.shape[0], device=same_T.device)
    began_T = before_T[torch.cummax(torch.where(same_T, index_T, 0), 0)[0]]
    chosen_T = torch.zeros_like(ordinary_T)
    chosen_T[order_T] = (began_T < share * total_N[text_ids_T[order_T]]) & ordinary_T[order_T]
    return chosen_T


def order_in_halves(text_ids_T: Tensor, row_T: Tensor, position_T: Tensor, *, seed: int, step: int) -> Tensor:
    """Token order that keeps each text's first token first and shuffles the others: the two halves of the
    decoder's rows."""
    rank_T = hashed_uniform(seed, step, _HALVES, row_T, position_T)
    order_T = torch.where(position_T == 0, -1.0, rank_T).argsort(stable=True)
    return order_T[text_ids_T[order_T].argsort(stable=True)]


def sum_by_text(flags_T: Tensor, text_ids_T: Tensor, num_texts: int) -> Tensor:
    """How many tokens of each text have the flag, int64 [N]."""
    return text_ids_T.new_zeros(num_texts).index_add_(0, text_ids_T, flags_T.long())
