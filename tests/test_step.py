"""One optimizer step: seeds, and what all ranks learn from each other's rows."""

import math

import pytest
import torch

from megam3.step import Wishes, join_ranks, seed_step

NAMES = ["loss/total", "loss/lexical", "lexical/mean_weight"]
COUNTS = [4.0, 100.0, 120.0, 1.0, 0.0, 0.0, 0.0, 0.0]
TIMES = [0.25, 2.0]


@pytest.mark.parametrize("seed", [0, 42, 281_000_000])
def test_seeds_that_torch_takes_give_the_numbers_they_always_gave(seed: int) -> None:
    seed_step(seed, 7, 3)
    drawn = torch.rand(8)
    torch.manual_seed((seed * 1_000_003 + 7) * 65_537 + 3)
    assert torch.equal(drawn, torch.rand(8))


def test_large_seeds_give_numbers_of_their_own_for_every_step_and_rank() -> None:
    drawn = set()
    for seed in (281_480_000, 2**40, 2**63 - 1):
        for step, rank in ((0, 0), (0, 1), (1, 0), (10**9, 1023)):
            seed_step(seed, step, rank)
            drawn.add(torch.initial_seed())
    assert len(drawn) == 12
    seed_step(2**63 - 1, 5, 1)
    first = torch.rand(8)
    seed_step(2**63 - 1, 5, 1)
    assert torch.equal(first, torch.rand(8))


def test_figures_are_means_and_counts_are_sums_over_ranks() -> None:
    report = join_ranks(
        NAMES,
        torch.tensor(
            [[1.0, 2.0, 3.0, *COUNTS, *TIMES], [3.0, 4.0, 5.0, *COUNTS[:-2], 1.0, 0.0, 0.5, 1.0]]
        ).double(),
    )
    assert report.figures == {"loss/total": 2.0, "loss/lexical": 3.0, "lexical/mean_weight": 4.0}
    assert (report.num_samples, report.num_tokens, report.padded_tokens, report.num_truncated) == (
        8,
        200,
        240,
        2,
    )
    assert (report.wishes, report.nonfinite) == (Wishes(save=True), "")
    assert report.seconds_by_part == {"data": [0.25, 0.5], "forward and backward": [2.0, 1.0]}


def test_a_non_finite_figure_is_traced_to_the_rank_it_came_from() -> None:
    nan = math.nan
    report = join_ranks(
        NAMES,
        torch.tensor([[nan, nan, 3.0, *COUNTS, *TIMES], [nan, math.inf, nan, *COUNTS, *TIMES]]).double(),
    )
    assert report.nonfinite == "rank 1: loss/total, loss/lexical, lexical/mean_weight"
