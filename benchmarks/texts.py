"""Texts of chosen lengths: words drawn by Zipf's law, written out as strings, so that every side tokenises
the same text itself.

Word `t17` is token 17 of the tokenizer in `models.py`; a text of n tokens is `<s>`, n - 2 words, `</s>`.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist

NUM_SPECIAL_IDS = 5
"""`<s> <pad> </s> <unk> <mask>`: ordinary words start at this id."""


@dataclass(frozen=True)
class Texts:
    """One batch: queries, and their passages in group order, the positive first."""

    query_lengths: tuple[int, ...]
    passage_lengths: tuple[int, ...]
    vocab_size: int
    seed: int = 0

    def as_json(self) -> dict:
        """What travels to a side: the strings themselves, and the lengths they must have after tokenising."""
        rng = random.Random(self.seed)
        return {
            **asdict(self),
            "queries": [make_text(rng, length, self.vocab_size) for length in self.query_lengths],
            "passages": [make_text(rng, length, self.vocab_size) for length in self.passage_lengths],
        }


def make_text(rng: random.Random, length_tokens: int, vocab_size: int) -> str:
    """Words whose ranks follow Zipf's law (density 1/rank), so that words repeat within and between texts as
    they do in language."""
    span = vocab_size - NUM_SPECIAL_IDS
    ranks = (int(span ** rng.random()) - 1 for _ in range(max(0, length_tokens - 2)))
    return " ".join(f"t{NUM_SPECIAL_IDS + rank}" for rank in ranks)


def equal_lengths(count: int, length_tokens: int) -> tuple[int, ...]:
    """`count` texts of one length."""
    return (length_tokens,) * count


def lognormal_lengths(
    count: int, median: float, sigma: float, shortest: int, longest: int, seed: int = 0
) -> tuple[int, ...]:
    """The distribution's own quantiles in shuffled order: a small batch then has the shape of a large sample,
    and no luck in it."""
    normal = NormalDist()
    quantiles = [median * 2.718281828 ** (sigma * normal.inv_cdf((i + 0.5) / count)) for i in range(count)]
    lengths = [min(longest, max(shortest, round(q))) for q in quantiles]
    random.Random(seed).shuffle(lengths)
    return tuple(lengths)


def xquad_like_lengths(num_queries: int, num_passages: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Questions of about 16 tokens (5 to 60), paragraphs of about 170 (30 to 800): lognormal, as SQuAD's
    paragraphs nearly are."""
    return lognormal_lengths(num_queries, 16, 0.35, 5, 60), lognormal_lengths(
        num_passages, 170, 0.45, 30, 800
    )


def long_tailed_lengths(count: int, longest: int = 8192) -> tuple[int, ...]:
    """Web-like: median 400, a heavy tail, and one text at the limit."""
    lengths = list(lognormal_lengths(count - 1, 400, 1.1, 32, longest))
    lengths.insert(count // 2, longest)
    return tuple(lengths)


def count_tokens(lengths: Sequence[int]) -> int:
    """Real tokens, padding not counted."""
    return sum(lengths)
