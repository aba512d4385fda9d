"""The plan against what it promises, on made-up indexes of any shape; no store is needed."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megam3.config.batch_size import bucket_edges
from megam3.config.schema import BatchConfig, DataConfig, DatasetConfig
from megam3.data.manifest import RUN_DTYPE
from megam3.data.plan import build_plan
from megam3.data.strata import DatasetRows
from megam3.errors import DataError

EDGES = [16, 32, 64, 128]
LANGUAGES = ["de", "sw", "zh"]


def make_rows(shards, name="d", first_row=0, **options) -> DatasetRows:
    """A dataset of shards, each a list of (language code, longest text) rows."""
    runs, row = [], 0
    for shard in shards:
        for (language, longest), count in sorted(Counter(shard).items()):
            runs.append((row, count, count * longest, language, longest))
            row += count
    fields = {
        "task": "t",
        "weight": 1.0,
        "in_batch_negatives": True,
        "passages_per_query": 2,
        "is_text": False,
    } | options
    return DatasetRows(
        name=name, languages=LANGUAGES, runs=np.array(runs, RUN_DTYPE), first_row=first_row, **fields
    )


def config_of(batch, **fields) -> DataConfig:
    return DataConfig(
        train=[DatasetConfig(name="d", paths=["x"])], batch=BatchConfig(**batch),
        length_buckets=EDGES,
        passage_max_tokens=128,
        query_max_tokens=32, **fields,
    )  # fmt: skip


ROW = st.tuples(st.integers(0, 2), st.integers(1, 128))
SHARDS = st.lists(st.lists(ROW, max_size=40), min_size=1, max_size=4)


@st.composite
def corpora(draw):
    """One to three datasets with at least one row, of two kinds of negatives and two tasks."""
    datasets, first = [], 0
    for number in range(draw(st.integers(1, 3))):
        shards = draw(SHARDS.filter(any))
        options = {"task": draw(st.sampled_from("ab")), "in_batch_negatives": draw(st.booleans())}
        datasets.append(make_rows(shards, f"d{number}", first, **options))
        first += sum(map(len, shards))
    return datasets, first


BATCHES = st.one_of(
    st.integers(1, 30).map(lambda n: {"global_queries": n}),
    st.integers(130, 5000).map(lambda n: {"global_tokens": n}),
    st.lists(st.integers(1, 30), min_size=4, max_size=4).map(
        lambda sizes: {"buckets": [{"max_tokens": e, "global_queries": q} for e, q in zip(EDGES, sizes)]}
    ),
)


def facts_of(datasets):
    """Row -> (dataset, language, longest), read from the runs one by one."""
    facts = {}
    for dataset in datasets:
        for run in dataset.runs:
            for row in range(int(run["first_row"]), int(run["first_row"] + run["num_rows"])):
                facts[dataset.first_row + row] = (dataset, LANGUAGES[run["language"]], int(run["longest"]))
    return facts


@given(
    corpora(),
    BATCHES,
    st.integers(0, 2**31),
    st.integers(0, 3),
    st.sampled_from(["dataset", "language", "task"]),
)
@settings(max_examples=150, deadline=None)
def test_every_row_exactly_once_per_epoch_and_batches_are_alike(corpus, batch, seed, epoch, by):
    datasets, num_rows = corpus
    config = config_of(batch, homogeneous_by=by)
    plan, facts = build_plan(config, datasets, seed), facts_of(datasets)
    served = []
    for index in range(plan.num_batches):
        planned = plan.batch(epoch * plan.num_batches + index)
        cell, rows = plan.cells[planned.cell], [facts[row] for row in planned.rows.tolist()]
        served += planned.rows.tolist()
        assert 0 < len(rows) <= cell.batch_queries
        assert max(longest for _, _, longest in rows) <= cell.max_tokens
        assert len({dataset.in_batch_negatives for dataset, _, _ in rows}) == 1
        labels = {
            {"dataset": dataset.name, "language": language, "task": dataset.task}[by]
            for dataset, language, _ in rows
        }
        assert len(labels) == 1 or any_is_small(config, plan, facts, by)
    assert sorted(served) == list(range(num_rows))


def any_is_small(config, plan, facts, by) -> bool:
    """Batches may only be mixed because some group cannot fill half a batch of its longest bucket."""
    groups = {}
    for dataset, language, longest in facts.values():
        key = (
            dataset.in_batch_negatives,
            {"dataset": dataset.name, "language": language, "task": dataset.task}[by],
        )
        groups.setdefault(key, []).append(longest)
    largest = {cell.max_tokens: cell.batch_queries for cell in plan.cells}
    edges = bucket_edges(config)
    for lengths in groups.values():
        edge = edges[int(np.searchsorted(edges, max(lengths)))]
        if 2 * len(lengths) < max(q for e, q in largest.items() if e >= edge) or len(lengths) < max(
            largest.values()
        ):
            return True
    return False


@given(corpora(), BATCHES, st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_batches_are_pure(corpus, batch, seed):
    datasets, _ = corpus
    plans = [build_plan(config_of(batch), datasets, seed) for _ in range(2)]
    number = 3 * plans[0].num_batches - 1
    for index in range(plans[1].num_batches):
        plans[1].batch(index)
    assert plans[0].fingerprint == plans[1].fingerprint
    assert plans[0].batch(number).rows.tolist() == plans[1].batch(number).rows.tolist()


def big_rows(count=3000, seed=0, **options):
    rng = np.random.default_rng(seed)
    return make_rows(
        [[(int(a), int(b)) for a, b in zip(rng.integers(0, 3, count), rng.integers(1, 129, count))]],
        **options,
    )


def epoch_rows(plan, epoch):
    return [plan.batch(epoch * plan.num_batches + index).rows.tolist() for index in range(plan.num_batches)]


def test_epochs_and_seeds_differ():
    plan, other = (build_plan(config_of({"global_queries": 32}), [big_rows()], seed) for seed in (1, 2))
    assert epoch_rows(plan, 0) != epoch_rows(plan, 1)
    assert epoch_rows(plan, 0) != epoch_rows(other, 0)
    assert plan.fingerprint != other.fingerprint


def test_order_of_buckets_and_rows_shows_no_pattern():
    plan = build_plan(config_of({"global_queries": 8}), [big_rows()], 3)
    buckets = [plan.batch(index).cell for index in range(plan.num_batches)]
    assert abs(np.corrcoef(buckets[:-1], buckets[1:])[0, 1]) < 5 / np.sqrt(len(buckets))
    rows = np.concatenate(epoch_rows(plan, 0)).astype(float)
    assert (
        abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.9
    )  # neighbours share a bucket, hence a range of rows, but not an order
    inside = [np.diff(plan.batch(index).rows) > 0 for index in range(plan.num_batches)]
    assert abs(np.concatenate(inside).mean() - 0.5) < 0.05


@pytest.mark.parametrize(("weight", "least", "most"), [(2.0, 2, 2), (0.5, 0, 1), (1.5, 1, 2)])
def test_weight_repeats_or_leaves_out_rows(weight, least, most):
    plan = build_plan(config_of({"global_queries": 32}), [big_rows(weight=weight)], 0)
    counts = np.bincount(np.concatenate(epoch_rows(plan, 0)), minlength=3000)
    assert (counts.min(), counts.max()) == (least, most)
    assert counts.sum() == pytest.approx(3000 * weight, abs=len(plan.strata))
    if weight == 0.5:
        again = np.bincount(np.concatenate(epoch_rows(plan, 1)), minlength=3000)
        assert (counts != again).sum() > 1000  # another half of the rows in another epoch


def test_a_row_served_again_is_another_pass():
    plan = build_plan(config_of({"global_queries": 32}), [big_rows(weight=2.0)], 0)
    seen = {
        (row, turn)
        for i in range(plan.num_batches)
        for row, turn in zip(plan.batch(i).rows.tolist(), plan.batch(i).passes.tolist())
    }
    assert seen == {(row, turn) for row in range(3000) for turn in (0, 1)}


def test_language_temperature():
    """Shares in proportion to rows ** (1 / temperature): 900, 90 and 10 rows at temperature 2."""
    rows = make_rows([[(0, 10)] * 900 + [(1, 10)] * 90 + [(2, 10)] * 10])
    plan = build_plan(config_of({"global_queries": 10}, language_temperature=2.0), [rows], 0)
    served = {stratum.language: stratum.num_served for stratum in plan.strata}
    roots = np.sqrt([900, 90, 10])
    np.testing.assert_allclose([served[name] for name in LANGUAGES], 1000 * roots / roots.sum(), atol=1)


def test_no_rows_at_all():
    with pytest.raises(DataError, match=r"data.train = \['d'\]: has no rows; add data"):
        build_plan(config_of({"global_queries": 4}), [make_rows([[]])], 0)


PROGRAM = """
from tests.data.test_plan import big_rows, build_plan, config_of
plan = build_plan(config_of({"global_queries": 32}), [big_rows()], 7)
print(plan.fingerprint, plan.batch(1234).rows.tolist())
"""


def test_same_in_another_process():
    plan = build_plan(config_of({"global_queries": 32}), [big_rows()], 7)
    environment = {"PYTHONHASHSEED": "5", "PYTHONPATH": "."}
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment
    ).stdout
    assert output.strip() == f"{plan.fingerprint} {plan.batch(1234).rows.tolist()}"
