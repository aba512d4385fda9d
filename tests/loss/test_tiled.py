"""The tiled loss against the plain one: values, every term, accuracies and gradients, in float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from megam3.batch import join_representations
from megam3.config.objective import UnifiedConfig
from megam3.config.weights import LossWeights, ScoreTemperatures
from megam3.dist import comm
from megam3.dist.gather import gather_rows
from megam3.loss.distillation import TeacherGroups
from megam3.loss.negatives import Negatives
from megam3.loss.settings import resolve_settings
from megam3.loss.tiled import tiled_unified_loss
from megam3.loss.unified import unified_loss
from megam3.scoring.combine import count_over_ranks, score_global, score_heads
from tests.ranks import run_ranks
from tests.representations import random_representations

GROUPS = ([3, 1, 2, 3], [2, 1], [])
DENSE_ONLY = UnifiedConfig(
    preset="joint", temperature=0.3, loss_weights=LossWeights(lexical=0.0, multi_vector=0.0)
)


def _side(rank):
    """Queries, passages, local group offsets, hashes (some equal across and within groups) and teacher scores
    of one rank."""
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


def _negatives(offsets, hashes, everyones_hashes, first, in_batch):
    starts, stops = offsets[:-1], offsets[1:]
    shift = first if in_batch else 0
    return Negatives(
        positive_column_Q=starts + shift,
        group_stop_Q=stops + shift,
        passage_hash_P=everyones_hashes if in_batch else hashes,
        known_positive_hash_QM=hashes[starts][:, None],
        in_batch_negatives=in_batch,
    )


def _teacher(negatives, taught, config):
    return (
        TeacherGroups(taught, *negatives.group_columns())
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
    UnifiedConfig(temperature=0.3, maxsim="sum"),
    UnifiedConfig(
        temperature=0.3,
        temperatures=ScoreTemperatures(lexical=2.0, multi_vector=0.7, sum=1.3),
        teacher="kl_div",
        teacher_temperature=3.0,
        teacher_student_temperature=0.8,
        teacher_weights=LossWeights(dense=0.0, lexical=0.5, multi_vector=2.0, sum=1.0),
    ),
    DENSE_ONLY,
]


def _both(rank, config, in_batch, distill, tile, only_tiled=False):
    """Plain and tiled numbers of this rank."""
    queries, passages, offsets, hashes, taught = _side(rank)
    settings, counts = resolve_settings(config), count_over_ranks(queries, passages)
    negatives = _negatives(offsets, hashes, gather_rows(hashes), counts.first_passage, in_batch)
    negatives = replace(negatives, mask_false_negatives=config.mask_false_negatives)
    teacher = _teacher(negatives, taught, config)
    leaves = [*queries.floats(), *passages.floats()]
    scores = score_global(queries, passages, settings.sum_weights, settings.maxsim, settings.heads, counts)
    if not in_batch:
        scores = score_heads(queries, passages, settings.sum_weights, settings.maxsim, settings.heads)
    scale = comm.world_size() / sum(counts.queries)
    plain = unified_loss(
        scores.by_name(),
        negatives.positive_column_Q,
        negatives.visible(),
        settings,
        scale,
        distill,
        teacher,
    )
    tiled = tiled_unified_loss(
        queries, passages, negatives, settings, counts, distill, teacher=teacher, tile_texts=tile
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
    negatives = Negatives(
        positive_column_Q=zero,
        group_stop_Q=zero + 1,
        passage_hash_P=zero,
        known_positive_hash_QM=zero[:, None],
    )
    settings, counts = resolve_settings(UnifiedConfig()), count_over_ranks(queries, passages)
    terms = tiled_unified_loss(queries, passages, negatives, settings, counts, True)
    assert terms.total.item() == 0.0
    terms.total.backward()
    for leaf in (*queries.floats(), *passages.floats()):
        assert leaf.grad is None or not leaf.grad.any()


def test_split_and_join_are_inverse():
    texts = random_representations(7, 3)
    joined = join_representations(texts.split([2, 0, 4, 1]))
    for ours, theirs in zip(vars(joined).values(), vars(texts).values()):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    bare = texts.keep_heads(("dense",))
    assert (bare.lexical_ids_Z.numel(), bare.multi_KC.shape[0], bare.multi_offsets_N1.tolist()) == (
        0,
        0,
        [0] * 8,
    )
