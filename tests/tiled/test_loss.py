"""The tiled loss against the plain one: values, every term, accuracies and gradients, in float64."""

import itertools

import pytest
import torch

from megam3.batch import join_representations
from megam3.candidates import Candidates
from megam3.config.schema import LossWeights, UnifiedConfig
from megam3.dist import comm
from megam3.dist.gather import gather_rows
from megam3.losses import resolve_weights, unified_loss
from megam3.scoring.combine import count_over_ranks, score_global, score_heads
from megam3.scoring.split import keep_heads, split_texts
from megam3.teacher import TeacherGroups
from megam3.tiled.loss import tiled_unified_loss
from tests.ranks import run_ranks
from tests.representations import random_representations

GROUPS = ([3, 1, 2, 3], [2, 1], [])
DENSE_ONLY = UnifiedConfig(
    preset="joint", temperature=0.3, loss_weights=LossWeights(lexical=0.0, multi_vector=0.0)
)


def _side(rank):
    """Queries, passages, local group offsets, hashes (some equal across and within groups) and teacher scores of one rank."""
    sizes = GROUPS[rank]
    generator = torch.Generator().manual_seed(50 + rank)
    hashes = torch.randint(0, 9, (sum(sizes),), generator=generator)
    taught = torch.randn(len(sizes), max([0, *sizes]), generator=generator, dtype=torch.float64)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return (
        random_representations(len(sizes), 30 + rank),
        random_representations(sum(sizes), 40 + rank),
        offsets,
        hashes,
        taught,
    )


def _candidates(offsets, hashes, everyones_hashes, first, in_batch):
    starts, stops = offsets[:-1], offsets[1:]
    if not in_batch:
        return Candidates(starts, stops, hashes, hashes[starts], False)
    return Candidates(starts + first, stops + first, everyones_hashes, hashes[starts], True)


def _teacher(candidates, taught, config):
    return (
        TeacherGroups(taught, *candidates.group_columns())
        if config.teacher or config.false_negative_margin_source == "teacher"
        else None
    )


def _numbers(terms, leaves):
    grads = torch.autograd.grad(terms.total, leaves, allow_unused=True)
    grads = [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads)]
    return [terms.total.detach(), dict(terms.terms), dict(terms.accuracy), grads]


CONFIGS = [
    UnifiedConfig(temperature=0.3),
    UnifiedConfig(temperature=0.3, false_negative_margin=0.2, preset="m3_v1"),
    UnifiedConfig(
        temperature=0.3, teacher="kl_div", false_negative_margin=0.5, false_negative_margin_source="teacher"
    ),
    UnifiedConfig(temperature=0.3, teacher="m3_kd_loss"),
    UnifiedConfig(temperature=0.3, mask_false_negatives=False),
    DENSE_ONLY,
]


def _both(rank, config, in_batch, distill, tile, only_tiled=False):
    """Plain and tiled numbers of this rank."""
    queries, passages, offsets, hashes, taught = _side(rank)
    settings, counts = resolve_weights(config), count_over_ranks(queries, passages)
    candidates = _candidates(offsets, hashes, gather_rows(hashes), counts.first_passage, in_batch)
    candidates = Candidates(**{**vars(candidates), "mask_false_negatives": config.mask_false_negatives})
    teacher = _teacher(candidates, taught, config)
    leaves = [*queries.floats(), *passages.floats()]
    scores = score_global(queries, passages, settings.sum_weights, heads=settings.heads, counts=counts)
    if not in_batch:
        scores = score_heads(queries, passages, settings.sum_weights, heads=settings.heads)
    scale = comm.world_size() / sum(counts.queries)
    plain = unified_loss(
        scores.by_name(),
        candidates.positive_column_Q,
        candidates.allowed(),
        settings,
        scale,
        distill,
        teacher,
    )
    tiled = tiled_unified_loss(
        queries, passages, candidates, settings, counts, distill, teacher=teacher, tile_texts=tile
    )
    return [_numbers(plain, leaves), _numbers(tiled, leaves)]


def _compare(plain, tiled):
    torch.testing.assert_close(tiled[0], plain[0], rtol=1e-11, atol=1e-13)
    for part in (1, 2):
        assert list(tiled[part]) == list(plain[part])
        for name, value in plain[part].items():
            torch.testing.assert_close(
                tiled[part][name], value, rtol=1e-11, atol=1e-13, check_dtype=False, msg=f"{name}"
            )
    for ours, theirs in zip(tiled[3], plain[3]):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize(("distill", "tile"), [(False, 2), (True, 3), (True, None)])
def test_equals_the_plain_loss_on_one_rank(config, in_batch, distill, tile):
    _compare(*_both(0, config, in_batch, distill, tile))


def _on_a_rank():
    cases = itertools.product(CONFIGS, [True, False], [False, True])
    return [_both(comm.rank(), config, in_batch, distill, 2) for config, in_batch, distill in cases]


@pytest.mark.ranks
def test_equals_the_plain_loss_over_three_ranks_one_of_them_empty():
    for results in run_ranks(_on_a_rank, 3):
        for plain, tiled in results:
            _compare(plain, tiled)


def test_a_single_query_with_a_single_passage_costs_nothing():
    queries, passages = random_representations(1, 1), random_representations(1, 2)
    zero = torch.zeros(1, dtype=torch.int64)
    candidates = Candidates(zero, zero + 1, zero, zero)
    settings, counts = resolve_weights(UnifiedConfig()), count_over_ranks(queries, passages)
    terms = tiled_unified_loss(queries, passages, candidates, settings, counts, True)
    assert terms.total.item() == 0.0
    terms.total.backward()
    for leaf in (*queries.floats(), *passages.floats()):
        assert leaf.grad is None or not leaf.grad.any()


def test_split_and_join_are_inverse():
    texts = random_representations(7, 3)
    joined = join_representations(split_texts(texts, [2, 0, 4, 1]))
    for ours, theirs in zip(vars(joined).values(), vars(texts).values()):
        assert torch.equal(ours, theirs)
    bare = keep_heads(texts, ("dense",))
    assert (bare.lexical_ids_Z.numel(), bare.multi_KC.shape[0], bare.multi_offsets_N1.tolist()) == (
        0,
        0,
        [0] * 8,
    )
