"""Heads against loops over texts and tokens, in float64, values and gradients."""

import pytest
import torch
from torch.nn.functional import normalize

from megam3.model.heads import (
    dense_vectors,
    lexical_weights,
    multi_vector_rows,
    normalize_rows,
)
from megam3.model.rows import select_unique_rows
from megam3.packed_texts import pack_texts

SPECIAL = (0, 1, 2, 3)
# repeated ids, an unknown token, a text of specials only, a text of one token
TOKEN_IDS = [[0, 7, 9, 7, 7, 2], [0, 3, 5, 2], [0, 2], [0], [0, 9, 8, 8, 9, 3, 9, 2]]


def naive_lexical(logits_T, token_ids):
    """One dictionary per text, filled token by token."""
    position, texts = 0, []
    for ids in token_ids:
        weights = {}
        for token in ids:
            if token not in SPECIAL:
                weights.setdefault(token, []).append(torch.relu(logits_T[position]))
            position += 1
        texts.append({token: torch.stack(values).max() for token, values in sorted(weights.items())})
    return texts


def random_tensor(*shape, seed=0):
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True
    )


def packed_structure(token_ids):
    texts = pack_texts(token_ids)
    return texts, texts.with_pairs(SPECIAL).lexical


def weights_of(logits_T, pairs):
    return lexical_weights(logits_T, pairs.pair_T, pairs.ids_Z.shape[0])


def test_lexical_weights_and_gradients_equal_a_loop():
    texts, structure = packed_structure(TOKEN_IDS)
    logits_T = random_tensor(texts.num_tokens)
    weights_Z = weights_of(logits_T, structure)
    expected = naive_lexical(logits_T, TOKEN_IDS)
    assert structure.offsets_N1.tolist() == [0, 2, 3, 3, 3, 5]
    assert structure.ids_Z.tolist() == [token for text in expected for token in text]
    expected_Z = torch.stack([value for text in expected for value in text.values()])
    torch.testing.assert_close(weights_Z, expected_Z)
    direction = torch.arange(1.0, len(weights_Z) + 1, dtype=torch.float64)
    got = torch.autograd.grad((weights_Z * direction).sum(), logits_T)[0]
    torch.testing.assert_close(got, torch.autograd.grad((expected_Z * direction).sum(), logits_T)[0])


def test_a_run_of_texts_keeps_its_own_pairs():
    """Views of the stream's pairs, as a chunk takes them, are what looking anew would find."""
    texts = pack_texts(TOKEN_IDS).with_pairs(SPECIAL)
    for start, stop in ((0, 2), (1, 4), (2, 2), (3, 5)):
        part, anew = (
            texts.select(start, stop).lexical,
            pack_texts(TOKEN_IDS[start:stop]).with_pairs(SPECIAL).lexical,
        )
        assert part.counts == anew.counts
        for name in ("ids_Z", "offsets_N1", "pair_T"):
            assert torch.equal(getattr(part, name), getattr(anew, name)), name


def test_equal_tokens_share_the_gradient_of_their_maximum():
    texts, structure = packed_structure([[0, 7, 7, 8, 2]])
    logits_T = torch.full((texts.num_tokens,), 0.3, requires_grad=True)
    weights_of(logits_T, structure).sum().backward()
    assert logits_T.grad.tolist() == [0, 0.5, 0.5, 1, 0]


def test_no_lexical_weight_without_ordinary_tokens():
    for token_ids in ([], [[0, 2]]):
        texts, structure = packed_structure(token_ids)
        assert weights_of(torch.ones(texts.num_tokens), structure).shape == (0,)
        assert structure.offsets_N1.tolist() == [0] * (len(token_ids) + 1)


def test_dense_vectors_are_the_normalised_first_tokens():
    texts = pack_texts(TOKEN_IDS)
    hidden_TD = random_tensor(texts.num_tokens, 6)
    got = dense_vectors(hidden_TD, texts.cu_seqlens_N1)
    expected = torch.stack([normalize(part[0], dim=-1) for part in hidden_TD.split(texts.lengths)])
    torch.testing.assert_close(got, expected)
    direction = torch.randn(got.shape, dtype=torch.float64)
    gradient = torch.autograd.grad((got * direction).sum(), hidden_TD)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * direction).sum(), hidden_TD)[0])


def test_multi_vector_rows_drop_the_first_token_and_keep_the_last():
    texts = pack_texts(TOKEN_IDS)
    projected_TC = random_tensor(texts.num_tokens, 5)
    got, offsets_N1 = multi_vector_rows(projected_TC, texts.cu_seqlens_N1)
    parts = [normalize(part[1:], dim=-1) for part in projected_TC.split(texts.lengths)]
    expected = torch.cat(parts)
    torch.testing.assert_close(got, expected)
    assert (offsets_N1[1:] - offsets_N1[:-1]).tolist() == [len(part) for part in parts]
    direction = torch.randn(got.shape, dtype=torch.float64)
    gradient = torch.autograd.grad((got * direction).sum(), projected_TC)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad((expected * direction).sum(), projected_TC)[0])


def test_bf16_leaves_in_the_promised_precision():
    texts, structure = packed_structure(TOKEN_IDS)
    hidden_TD = random_tensor(texts.num_tokens, 64).detach().bfloat16()
    assert dense_vectors(hidden_TD, texts.cu_seqlens_N1).dtype is torch.float32
    assert weights_of(hidden_TD[:, 0], structure).dtype is torch.float32
    rows, _ = multi_vector_rows(hidden_TD, texts.cu_seqlens_N1)
    assert rows.dtype is torch.bfloat16
    # each element is rounded once, from a norm taken in fp32
    assert torch.equal(normalize_rows(hidden_TD), normalize(hidden_TD.float(), dim=-1).bfloat16())


def test_a_row_of_zeros_stays_zero_and_passes_no_nan():
    rows = torch.zeros(2, 4, requires_grad=True)
    normalize_rows(rows).sum().backward()
    assert torch.isfinite(rows.grad).all()


@pytest.mark.parametrize("index", [[3, 0, 1], [], [2]])
def test_unique_rows_equal_indexing(index):
    rows, index_K = random_tensor(4, 3), torch.tensor(index, dtype=torch.int64)
    torch.testing.assert_close(select_unique_rows(rows, index_K), rows[index_K])
    assert torch.autograd.gradcheck(lambda x: select_unique_rows(x, index_K), rows)


def test_memory_does_not_follow_the_vocabulary():
    """An id near 2**31 needs no more room than any other: nothing is indexed by id."""
    huge = 2**31 - 1
    texts, structure = packed_structure([[0, huge, 5, huge, 2], [0, huge, 2]])
    assert structure.ids_Z.tolist() == [5, huge, huge]
    assert weights_of(torch.arange(8.0), structure).tolist() == [2, 3, 6]
