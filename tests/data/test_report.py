"""What `plan-epochs` says of padding: never less than none."""

import json

import numpy as np
import pytest

from megam3.data.assemble import Assembler
from megam3.data.plan import build_plan
from megam3.data.prepare import prepare_data
from megam3.data.report import estimate_plan, plan_facts, plan_report
from megam3.data.worker import describe, open_all
from tests.data.pairs import data_config, make_records, write_jsonl


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize(
    "records", [{"max_words": 60, "num_negatives": 2}, {"max_words": 2}, {"num_negatives": 0}]
)
def test_padding_avoided_is_a_share_of_real_padding(tmp_path, tokenizer, records, world_size) -> None:
    rows = make_records(60, **records)
    for number, row in enumerate(rows):  # groups of one, two and three passages, of very different lengths
        row["neg"] = row["neg"][: number % 3]
        row["pos"] = row["pos"] * (1 + number % 2)
    config = data_config(write_jsonl(tmp_path / "d.jsonl", rows), passages_per_query=3)
    prepare_data(config, tokenizer, tmp_path / "s")
    opened = open_all(config, tmp_path / "s")
    plan = build_plan(config, describe(config, opened), 1)
    assembler = Assembler(config, plan, opened, frame=None)  # type: ignore[arg-type]
    estimate = estimate_plan(plan, assembler, world_size)
    # the same by hand: every rank's queries and passages, each padded to the rank's longest
    tokens = sum(assembler.row_tokens(plan.batch(number))[:2].sum() for number in range(plan.num_batches))
    assert estimate.tokens_per_batch == pytest.approx(tokens / plan.num_batches)
    assert 0 <= estimate.padding_avoided < 1
    if world_size == 1:
        padded = 0.0
        for number in range(plan.num_batches):
            query, passages, group = assembler.row_tokens(plan.batch(number))
            means = [p / g for p, g in zip(passages, group) if g]
            padded += len(query) * max(query) + max(means, default=0) * sum(group)
        assert estimate.padding_avoided == pytest.approx(1 - tokens / padded)
    assert f"padding avoided: {estimate.padding_avoided:.1%}" in plan_report(plan, estimate, 1, world_size)
    assert np.isfinite(estimate.imbalance)


def test_the_facts_are_those_of_the_report(tmp_path, tokenizer) -> None:
    config = data_config(write_jsonl(tmp_path / "d.jsonl", make_records(50)))
    prepare_data(config, tokenizer, tmp_path / "s")
    opened = open_all(config, tmp_path / "s")
    plan = build_plan(config, describe(config, opened), 1)
    estimate = estimate_plan(plan, Assembler(config, plan, opened, frame=None), 1)  # type: ignore[arg-type]
    facts, text = plan_facts(plan, estimate, 2, 1), plan_report(plan, estimate, 2, 1)
    assert facts["queries"] == sum(facts["queries_by_language"].values()) == 50
    assert sum(cell["queries"] for cell in facts["cells"]) == 50
    assert facts["optimizer_steps"] == facts["batches"] / 2
    assert f"one epoch: 50 queries in {facts['batches']:,} batches" in text
    assert json.loads(json.dumps(facts)) == facts
