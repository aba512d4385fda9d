"""The choice of a memory strategy against hand counts and against every setting written out."""

from dataclasses import replace
from itertools import product

import pytest

from megam3.planning.memory import plan_memory
from megam3.planning.shapes import StepShape, Strategy
from megam3.planning.strategy import Hardware, Setting, fitting, forward_flops, num_chunks, predict
from tests.planning.test_memory import BGE_M3

LIMIT = 78 << 30
"""80 GiB less 2 for CUDA and NCCL."""
UNIFIED_8K = StepShape(num_queries=21, num_passages=168, query_tokens=512, passage_tokens=8192)
"""One rank's share of the unified recipe's last bucket on 8 GPUs."""
TEMPLATES = {
    f"zero{stage}": Strategy(
        zero_stage=stage, world_size=8, bucket_elements=200_000_000, live_parameters=100_000_000
    )
    for stage in range(4)
}
NO_LINKS = Hardware(exposed_share=0.0, memory_bytes_per_second=float("inf"))


def setting(stage: int, *, checkpointing: bool = False, offload: bool = False, chunk: int | None = None):
    strategy = replace(TEMPLATES[f"zero{stage}"], checkpointing=checkpointing, activation_offload=offload)
    return Setting(template=f"zero{stage}", strategy=strategy, chunk_tokens=chunk)


@pytest.mark.parametrize(
    ("checkpointing", "chunk", "units"),
    [(False, None, 3), (False, 8192, 4), (True, None, 4), (True, 8192, 5)],
)
def test_compute_is_counted_in_forward_passes(checkpointing, chunk, units):
    candidate = predict(BGE_M3, setting(2, checkpointing=checkpointing, chunk=chunk), [UNIFIED_8K], NO_LINKS)
    assert candidate.cost == candidate.compute_units == units


def test_a_chunk_that_holds_the_step_costs_no_first_pass_and_is_planned_as_one_pass():
    step = StepShape(num_queries=1, num_passages=8, query_tokens=32, passage_tokens=128)
    whole = predict(BGE_M3, setting(2, chunk=step.num_tokens), [step])
    assert whole == replace(predict(BGE_M3, setting(2), [step]), setting=whole.setting)
    assert num_chunks(step, step.num_tokens - 1) == 2
    # a chunk is never smaller than a text
    assert num_chunks(step, 1) == -(-step.num_tokens // 128)


def test_operations_of_a_forward_pass_by_hand():
    model = replace(BGE_M3, num_layers=1, hidden_size=4, intermediate_size=8)
    step = StepShape(num_queries=1, num_passages=1, query_tokens=3, passage_tokens=5)
    # 8 tokens through four 4×4 and two 4×8 matrices; scores and values of a 3×3 and a 5×5 square
    assert forward_flops(model, step) == 2 * 8 * (4 * 16 + 2 * 32) + 2 * 2 * 4 * (9 + 25)


def test_slower_links_cost_more_and_offload_copies_both_ways():
    args = BGE_M3, setting(3, chunk=8192), [UNIFIED_8K]
    assert predict(*args).exposed_units < predict(*args, Hardware(ranks_per_node=4)).exposed_units
    rates = Hardware(local_bytes_per_second=1e30, host_bytes_per_second=1e9, exposed_share=1.0)
    offloaded = predict(BGE_M3, setting(3, checkpointing=True, offload=True), [UNIFIED_8K], rates)
    copied = 2 * 24 * UNIFIED_8K.num_tokens * 1024 * 2
    expected = copied / 1e9 / (forward_flops(BGE_M3, UNIFIED_8K) / rates.flops_per_second)
    assert offloaded.exposed_units == pytest.approx(expected)


def _brute_force(step: StepShape, limit_bytes: int) -> list[tuple[float, Setting]]:
    """Every setting that fits and sums in fp32, written out without the enumeration under test."""
    chunks: list[int | None] = [None]
    size = 8192
    while size < step.num_tokens:
        chunks.append(size)
        size *= 2
    found = []
    for stage, (checkpointing, offload), chunk in product(
        range(4), [(False, False), (True, False), (True, True)], chunks
    ):
        if chunk is not None and stage < 2:
            continue
        for once in (False, True) if stage == 2 and chunk is not None else (False,):
            each = setting(stage, checkpointing=checkpointing, offload=offload, chunk=chunk)
            each = replace(each, strategy=replace(each.strategy, reduces_once=once))
            plan = plan_memory(BGE_M3, each.strategy, replace(step, chunk_tokens=chunk))
            if plan.total_bytes <= limit_bytes:
                found.append((predict(BGE_M3, each, [step]).cost, each))
    return found


@pytest.mark.parametrize("limit_gib", [78, 40, 24])
@pytest.mark.parametrize(
    "step",
    [UNIFIED_8K, replace(UNIFIED_8K, num_queries=1, num_passages=8), replace(UNIFIED_8K, num_passages=21)],
)
def test_no_setting_that_fits_is_faster_than_the_choice(step, limit_gib):
    candidates = fitting(BGE_M3, TEMPLATES, [step], limit_gib << 30)
    expected = _brute_force(step, limit_gib << 30)
    assert len(candidates) == len(expected)
    best = candidates[0]
    assert best.peak_bytes <= limit_gib << 30
    assert best.cost == min(cost for cost, _ in expected)
    assert [c.cost for c in candidates] == sorted(cost for cost, _ in expected)


def test_the_8k_bucket_on_eight_gpus_needs_neither_stage_3_nor_checkpointing():
    best = fitting(BGE_M3, TEMPLATES, [UNIFIED_8K], LIMIT)[0]
    assert (best.setting.template, best.compute_units) == ("zero2", 4)
    assert not best.setting.strategy.checkpointing
    assert best.peak_bytes <= LIMIT
    # one pass of checkpointed layers with offload is 4 as well, and its copies cost more than chunks
    assert best.exposed_units < 0.05


def test_every_bucket_must_fit_not_only_the_one_with_most_tokens():
    # few tokens, but so many short texts that the loss is what needs memory
    many = StepShape(num_queries=6000, num_passages=6000, query_tokens=16, passage_tokens=16)
    alone = predict(BGE_M3, setting(2, chunk=8192), [UNIFIED_8K]).peak_bytes
    both = predict(BGE_M3, setting(2, chunk=8192), [UNIFIED_8K, many]).peak_bytes
    assert many.num_tokens < UNIFIED_8K.num_tokens
    assert both == max(alone, predict(BGE_M3, setting(2, chunk=8192), [many]).peak_bytes)


def test_bf16_sums_are_not_chosen_and_fp32_ones_are():
    chosen = fitting(BGE_M3, TEMPLATES, [UNIFIED_8K], LIMIT)
    assert all(c.setting.strategy.zero_stage >= 2 for c in chosen if c.setting.chunk_tokens is not None)
    fp32 = {name: replace(strategy, precision_bytes=4) for name, strategy in TEMPLATES.items()}
    assert any(
        c.setting.strategy.zero_stage < 2 and c.setting.chunk_tokens is not None
        for c in fitting(BGE_M3, fp32, [UNIFIED_8K], LIMIT)
    )


def test_nothing_fits_is_an_empty_list():
    assert fitting(BGE_M3, TEMPLATES, [UNIFIED_8K], 1 << 30) == []


def test_a_setting_is_written_as_overrides():
    assert setting(2, checkpointing=True, chunk=8192).fields() == (
        "engine.template=zero2 engine.activation_checkpointing=true engine.activation_offload=false"
        " data.batch.chunk_tokens=8192"
    )
    assert setting(0).fields().endswith("data.batch.chunk_tokens=null")
