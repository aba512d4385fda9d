"""Masking: whole words, exact shares without a cap, nothing special, a function of seed, step and row
alone."""

import pytest
import torch

from megam3.model.masking import hashed_uniform, mask_tokens, order_in_halves, vocabulary_tables
from megam3.packed_texts import pack_stream

# ids 0-4 are special; even ids begin a word
PIECES = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    "<mask>",
    *(("▁" if i % 2 == 0 else "") + f"p{i}" for i in range(5, 500)),
]
TABLES = vocabulary_tables(PIECES, (0, 1, 2, 3), 4)


def stream(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    parts = [
        torch.cat(
            [torch.tensor([0]), torch.randint(5, 500, (n - 2,), generator=generator), torch.tensor([2])]
        )
        for n in lengths
    ]
    return pack_stream(torch.cat(parts), lengths)


def mask(texts, rows, share=0.3, seed=7, step=3, replace=(0.8, 0.1)):
    text_ids = texts.text_ids_T()
    return mask_tokens(
        texts.input_ids_T,
        text_ids,
        torch.tensor(rows)[text_ids],
        texts.position_ids_T,
        TABLES,
        num_texts=texts.num_texts,
        share=share,
        replace=replace,
        seed=seed,
        step=step,
    )


def words_of(ids):
    """Lists of positions, by a plain walk."""
    words = []
    for i, token in enumerate(ids):
        if token < 5:
            words.append([])
        elif not words or PIECES[token].startswith("▁") or ids[i - 1] < 5:
            words.append([i])
        else:
            words[-1].append(i)
    return [w for w in words if w]


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5])
def test_whole_words_reach_the_share_in_every_text(share):
    texts = stream((8192, 40, 2, 3, 700))
    hidden = set(mask(texts, [5, 6, 7, 8, 9], share).hidden_T.nonzero().flatten().tolist())
    start = 0
    for length in texts.lengths:
        words = words_of(texts.input_ids_T[start : start + length].tolist())
        chosen = [w for w in words if start + w[0] in hidden]
        count = sum(start + i in hidden for i in range(length))
        assert count == sum(map(len, chosen))
        assert all(start + i in hidden for w in chosen for i in w)
        # reached by the last word, and not a word later
        wanted = share * (length - 2)
        longest = max(map(len, words), default=0)
        assert wanted <= count < wanted + longest or length == 2
        start += length


def test_replacements_have_their_shares_and_stay_in_place():
    texts = stream((8192,) * 4)
    masked = mask(texts, [0, 1, 2, 3])
    hidden = masked.hidden_T.nonzero().squeeze(1)
    untouched = torch.ones(texts.num_tokens, dtype=torch.bool)
    untouched[hidden] = False
    assert torch.equal(masked.input_ids_T[untouched], texts.input_ids_T[untouched])
    new, old = masked.input_ids_T[hidden], texts.input_ids_T[hidden]
    n = len(hidden)
    # five standard deviations of a binomial; a random id equals the old one once in 495
    for count, p in (((new == 4).sum(), 0.8), ((new == old).sum(), 0.1 + 0.1 / 495)):
        assert abs(int(count) - n * p) < 5 * (n * p * (1 - p)) ** 0.5
    assert not TABLES.special_V[new[new != 4]].any()


def test_masks_depend_on_seed_step_and_row_and_not_on_neighbours():
    texts = stream((300, 200))
    both, alone = mask(texts, [5, 6]), mask(texts.select(1, 2), [6])
    assert torch.equal(both.input_ids_T[300:], alone.input_ids_T)
    for other in (mask(texts, [5, 6], seed=8), mask(texts, [5, 6], step=4), mask(texts, [6, 5])):
        assert not torch.equal(other.hidden_T, both.hidden_T)


def test_hashed_numbers_are_uniform():
    u = hashed_uniform(1, 2, 3, torch.arange(100_000) // 100, torch.arange(100_000) % 100)
    assert u.min() >= 0
    assert u.max() < 1
    # standard deviation of the mean of 1e5 uniforms is 0.0009, of a bin of ten 95
    assert abs(u.mean() - 0.5) < 0.005
    assert (torch.histc(u, 10, 0, 1) - 10_000).abs().max() < 500


def test_halves_keep_the_first_token_first():
    texts = stream((9, 2, 5))
    text_ids = texts.text_ids_T()
    order = order_in_halves(text_ids, text_ids, texts.position_ids_T, seed=1, step=1)
    assert torch.equal(order.sort()[0], torch.arange(16))
    assert torch.equal(text_ids[order], text_ids)
    assert order[[0, 9, 11]].tolist() == [0, 9, 11]
