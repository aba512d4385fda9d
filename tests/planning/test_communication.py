"""Bytes sent in a step, against the published factors and against a ring written out."""

import re
from pathlib import Path

import pytest

from megam3.planning.communication import step_volume
from megam3.planning.parameters import num_parameters
from tests.planning.test_memory import BGE_M3

DOCS = Path(__file__).parents[2] / "docs"
PSI = 1_000_000


def volume(stage: int, world_size: int, num_chunks: int = 1) -> int:
    return step_volume(
        zero_stage=stage, world_size=world_size, num_parameters=PSI, num_chunks=num_chunks, precision_bytes=2
    ).total_bytes


@pytest.mark.parametrize(("stage", "factor"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_one_pass_moves_the_published_multiple_of_the_parameters(stage, factor):
    # the paper leaves out the (W-1)/W of a ring, which many ranks approach
    assert volume(stage, 100_000) == pytest.approx(factor * PSI * 2, rel=1e-4)


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_ring_all_reduce_sends_as_much(world_size):
    """Every rank sends one of W pieces W-1 times to sum them, and W-1 times to spread the sums."""
    piece = PSI * 2 // world_size
    sent = sum(piece for _ in range(world_size - 1)) + sum(piece for _ in range(world_size - 1))
    assert volume(0, world_size) == sent


def test_one_rank_sends_nothing():
    assert [volume(stage, 1, num_chunks=5) for stage in range(4)] == [0, 0, 0, 0]


def test_chunks_repeat_what_no_rank_keeps():
    part = PSI * 2 // 2
    assert volume(1, 2, num_chunks=4) == 2 * part
    # stage 2: four sums of gradients, weights once
    assert volume(2, 2, num_chunks=4) == 5 * part
    # stage 3: weights for both forward passes and the backward pass, and gradients, of every chunk
    assert volume(3, 2, num_chunks=4) == 16 * part


def test_the_table_in_docs_is_what_the_function_says():
    text = (DOCS / "scale.md").read_text(encoding="utf-8").split("## What a rank sends in a step")[1]
    rows = re.findall(r"^\| (0, 1|2|3) \|(.*)\|$", text.split("\n## ")[0], flags=re.MULTILINE)
    assert len(rows) == 3
    for stages, cells in rows:
        for stage in map(int, stages.split(", ")):
            expected = [
                step_volume(
                    zero_stage=stage,
                    world_size=8 * nodes,
                    num_parameters=num_parameters(BGE_M3),
                    num_chunks=chunks,
                )
                for chunks in (1, 8)
                for nodes in (1, 4, 12)
            ]
            assert [float(cell) for cell in cells.split("|")] == [
                round(volume.total_bytes / 1e9, 2) for volume in expected
            ]
