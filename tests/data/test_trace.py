"""Rows of a step, against those that all ranks together are given, with ranges left out and two datasets."""

import pytest

from megam3.config.schema import BatchConfig, DataConfig, DatasetConfig
from megam3.data.dataset import open_training_data
from megam3.data.trace import dataset_of, rows_of_step, source_of
from tests.data.pairs import make_records, write_jsonl


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("trace")
    datasets = []
    for seed, name in enumerate(("first", "second")):
        path = write_jsonl(folder / f"{name}.jsonl", make_records(40, seed=seed, max_words=20))
        datasets.append(DatasetConfig(name=name, paths=[str(path)]))
    batch = BatchConfig(global_queries=8, accumulation_steps=2)
    config = DataConfig(
        train=datasets, batch=batch, query_max_tokens=32, passage_max_tokens=64, num_workers=0
    )
    return open_training_data(config, tokenizer, folder / "store", 1)


@pytest.mark.parametrize("skipped", [[], [[1, 3]], [[0, 1], [3, 5]]])
def test_the_rows_are_those_that_all_ranks_are_given(data, skipped):
    served = [list(data.batches(rank, 2, 0, 6, skipped)) for rank in range(2)]
    for step in range(6):
        found = rows_of_step(data, step, skipped)
        assert len(found) == 2
        for part, batch in enumerate(found):
            given = [row for rank in range(2) for row in served[rank][step][part].rows.tolist()]
            assert sorted(row for rows in batch.rows_by_dataset.values() for row in rows) == sorted(given)


def test_each_row_stands_under_the_name_of_its_dataset(data):
    names = set()
    for step in range(data.num_steps_per_epoch):
        for batch in rows_of_step(data, step):
            for name, rows in batch.rows_by_dataset.items():
                names.add(name)
                assert {f"{name}.jsonl" in source_of(data, row) for row in rows} == {True}
                assert all((row < 40) == (name == "first") for row in rows)
    assert names == {"first", "second"}
    assert [dataset_of(data, row) for row in (0, 39, 40, 79)] == [0, 0, 1, 1]


def test_the_source_is_the_line_of_the_record(data):
    lines = {source_of(data, row).rpartition(":")[2] for row in range(40)}
    assert lines == {str(number) for number in range(1, 41)}
