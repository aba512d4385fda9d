import pytest
import torch
from torch import nn

from megam3.batch import Representations, join_representations
from megam3.config.objective import UnifiedConfig
from megam3.config.weights import HEADS, HeadWeights
from megam3.cost import plan_chunks
from megam3.dist import comm
from megam3.gradcache import cached_step
from megam3.loss.settings import NAMES, resolve_settings
from megam3.loss.unified import unified_loss
from megam3.packed_texts import pack_texts
from megam3.scoring.combine import count_over_ranks, score_global
from tests.ranks import run_ranks

WEIGHTS = HeadWeights(dense=1.0, lexical=0.3, multi_vector=1.0)


class Encoder(nn.Module):
    """Three heads over a bag of embeddings, with dropout: small, in float64, and aware of text borders."""

    def __init__(self, dropout):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(30, 6, dtype=torch.float64)
        self.dropout = nn.Dropout(dropout)
        self.mix = nn.Linear(6, 6, dtype=torch.float64)
        self.lexical = nn.Linear(6, 1, dtype=torch.float64)
        self.multi = nn.Linear(6, 4, dtype=torch.float64)
        self.calls = []

    def forward(self, texts):
        self.calls.append((texts.num_texts, texts.num_tokens))
        text_T = texts.text_ids_T()
        hidden = torch.tanh(self.mix(self.dropout(self.embed(texts.input_ids_T))))
        dense = torch.zeros(texts.num_texts, 6, dtype=torch.float64).index_add(0, text_T, hidden)
        first_T = texts.position_ids_T == 0
        # token ids are distinct within each text of these tests, so every token but the first is a pair of
        # its own
        order = torch.argsort(text_T[~first_T] * 1000 + texts.input_ids_T[~first_T])
        counts = torch.tensor(texts.lengths) - 1
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return Representations(
            dense_ND=nn.functional.normalize(dense, dim=1),
            lexical_weights_Z=torch.relu(self.lexical(hidden).squeeze(1) + 1)[~first_T][order],
            lexical_ids_Z=texts.input_ids_T[~first_T][order],
            lexical_offsets_N1=offsets,
            multi_KC=nn.functional.normalize(self.multi(hidden[~first_T]), dim=1),
            multi_offsets_N1=offsets,
        )


def _texts(num, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 7, (num,), generator=generator).tolist()
    return pack_texts(
        [[0, *(1 + torch.randperm(29, generator=generator)[: length - 1]).tolist()] for length in lengths]
    )


def _loss(num_queries):
    """Unified loss with distillation; passages follow the queries, two to each."""

    def loss(representations):
        queries = representations.select(0, num_queries)
        passages = representations.select(num_queries, representations.num_texts)
        counts = count_over_ranks(queries, passages)
        scores = score_global(queries, passages, WEIGHTS, heads=HEADS, counts=counts).by_name()
        positive = counts.first_passage + 2 * torch.arange(num_queries)
        everything = torch.ones(num_queries, sum(counts.passages), dtype=torch.bool)
        scale = comm.world_size() / sum(counts.queries)
        terms = unified_loss(
            scores, positive, everything, resolve_settings(UnifiedConfig(temperature=0.3)), scale, True
        )
        return terms.total, terms

    return loss


def _step(texts, num_queries, chunk_tokens, dropout=0.0):
    """Gradients of every parameter after one step, averaged over ranks as an engine would; and what was
    called."""
    encoder, lasts = Encoder(dropout), []

    def backward(tensor, is_last):
        lasts.append(is_last)
        tensor.backward()

    torch.manual_seed(7)
    terms = cached_step(texts, chunk_tokens, encoder, _loss(num_queries), backward)
    grads = {name: comm.all_reduce_sum(p.grad) / comm.world_size() for name, p in encoder.named_parameters()}
    return grads, terms, lasts, encoder.calls


@pytest.mark.parametrize("chunk_tokens", [1, 9, 1000])
def test_cached_equals_uncached_for_every_parameter(chunk_tokens):
    texts = _texts(12, 1)
    plain, plain_terms, lasts, calls = _step(texts, 4, None)
    assert lasts == [True]
    assert calls == [(12, texts.num_tokens)]
    cached, terms, lasts, calls = _step(texts, 4, chunk_tokens)
    num_chunks = len(plan_chunks(texts.lengths, chunk_tokens))
    assert lasts == [False] * (num_chunks - 1) + [True]
    assert len(calls) == (2 * num_chunks if num_chunks > 1 else 1)
    assert terms.total.item() == pytest.approx(plain_terms.total.item(), rel=1e-13)
    assert list(terms.terms) == list(plain_terms.terms)
    assert all(name in terms.accuracy for name in NAMES)
    for name, grad in cached.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(grad, plain[name], rtol=1e-10, atol=1e-12)


def test_dropout_is_replayed_bit_for_bit():
    texts, seen = _texts(9, 2), {True: [], False: []}
    encoder = Encoder(0.4)

    def encode(chunk):
        representations = encoder(chunk)
        seen[torch.is_grad_enabled()].append(representations)
        return representations

    torch.manual_seed(3)
    cached_step(texts, 8, encode, _loss(3), lambda tensor, is_last: tensor.backward())
    after = torch.rand(4)
    assert len(seen[True]) == len(seen[False]) > 2
    for first, second in zip(seen[False], seen[True]):
        for one, other in zip(first.floats(), second.floats()):
            assert torch.equal(one, other)
    assert not torch.equal(encoder(texts).dense_ND, encoder(texts).dense_ND), (
        "dropout was off: the test would prove nothing"
    )

    # whatever is drawn after the step does not depend on whether chunks were replayed
    torch.manual_seed(3)
    for chunk in (texts.select(start, stop) for start, stop in plan_chunks(texts.lengths, 8)):
        encoder(chunk)
    assert torch.equal(torch.rand(4), after)


def test_with_dropout_gradients_are_those_of_the_same_draws():
    texts, encoder = _texts(9, 2), Encoder(0.4)
    cached, _, _, _ = _step(texts, 3, 8, dropout=0.4)
    torch.manual_seed(7)
    from_chunks = [encoder(texts.select(start, stop)) for start, stop in plan_chunks(texts.lengths, 8)]
    _loss(3)(join_representations(from_chunks))[0].backward()
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(cached[name], parameter.grad, rtol=1e-10, atol=1e-12)


def test_a_head_without_loss_still_gets_gradients():
    texts, encoder = _texts(5, 3), Encoder(0.0)
    cached_step(
        texts,
        4,
        encoder,
        lambda r: (r.dense_ND.square().sum() * 0 + r.dense_ND[:, 0].sum(), None),
        lambda t, last: t.backward(),
    )
    assert encoder.mix.weight.grad.abs().max() > 0
    assert not encoder.lexical.weight.grad.any()
    assert not encoder.multi.weight.grad.any()


SHARES = {"short": ((4, 12), (1, 3)), "empty": ((5, 15), (0, 0))}


def _share(rank, kind):
    """This rank's queries and texts of a batch both ranks make alike."""
    (queries_0, texts_0), (queries_1, texts_1) = SHARES[kind]
    both = [_texts(texts_0, 1), _texts(texts_1, 2)]
    return both[rank], (queries_0, queries_1)[rank]


def _step_on_a_rank(kind):
    texts, num_queries = _share(comm.rank(), kind)
    results = []
    for chunk_tokens in (None, 9):
        grads, terms, lasts, calls = _step(texts, num_queries, chunk_tokens)
        results.append([grads, terms.total.detach(), lasts, len(calls)])
    return results


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["short", "empty"])
def test_two_ranks_equal_one_rank_with_short_and_empty_ranks(kind):
    results = run_ranks(_step_on_a_rank, 2, kind)
    # one rank: all queries, then all passages, so that columns come in the same order
    parts = [_share(rank, kind) for rank in range(2)]
    queries = [ids for texts, num in parts for ids in _ids(texts.select(0, num))]
    passages = [ids for texts, num in parts for ids in _ids(texts.select(num, texts.num_texts))]
    expected, terms, _, _ = _step(pack_texts(queries + passages), len(queries), None)
    for index in range(2):
        assert results[0][index][2:] == results[1][index][2:], "ranks must run equally many chunks"
        total = (results[0][index][1] + results[1][index][1]) / 2
        torch.testing.assert_close(total, terms.total.detach(), rtol=1e-12, atol=0)
        for name, grad in expected.items():
            torch.testing.assert_close(results[0][index][0][name], grad, rtol=1e-9, atol=1e-11)


def _ids(texts):
    return [part.tolist() for part in texts.input_ids_T.split(list(texts.lengths))] if texts.num_texts else []
