import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megam3.config.batch_size import queries_in_buckets
from megam3.cost import text_cost
from megam3.data.assemble import SEGMENT_ORDERS, draw_group, pack_documents, shuffle_segments
from megam3.data.dataset import open_training_data
from megam3.data.permute import key_of
from megam3.data.shard import StoredRow
from tests.data.pairs import data_config, make_records, write_jsonl


def stored_row(num_positives: int, num_negatives: int, scores=(), only_one_negative=False) -> StoredRow:
    num_texts = 1 + num_positives + num_negatives
    offsets, hashes = np.arange(num_texts + 1), np.arange(num_texts)
    return StoredRow(
        tokens=np.arange(num_texts),
        offsets=offsets,
        hashes=hashes,
        truncated=np.zeros(num_texts),
        scores=np.asarray(scores),
        num_positives=num_positives,
        only_one_negative=only_one_negative,
    )


@given(st.integers(1, 4), st.integers(0, 9), st.integers(1, 9), st.integers(0, 2**40), st.booleans())
def test_group_is_one_positive_and_distinct_negatives(num_positives, num_negatives, size, row, only_one):
    group = draw_group(stored_row(num_positives, num_negatives, only_one_negative=only_one), size, 5, row, 0)
    assert 1 <= group[0] <= num_positives
    assert len(set(group)) == len(group) == 1 + min(num_negatives, size - 1, 1 if only_one else 99)
    assert all(num_positives < index <= num_positives + num_negatives for index in group[1:])


def test_draws_are_uniform_and_change_with_row_epoch_and_pass():
    row, counts = stored_row(3, 6), np.zeros(10)
    for number in range(3000):
        np.add.at(counts, draw_group(row, 4, key_of(0, 0), number, 0), 1)
    assert ((counts[1:4] - 1000) ** 2 / 1000).sum() < 30
    assert ((counts[4:] - 1500) ** 2 / 1500).sum() < 40
    draws = [[draw_group(row, 4, key_of(0, epoch), 7, turn) for epoch in range(20)] for turn in (0, 1)]
    assert len({tuple(group) for group in draws[0]}) > 10
    assert draws[0] != draws[1]


def test_negatives_by_descending_teacher_score():
    row = stored_row(1, 6, scores=[0.0, 3.0, 1.0, 6.0, 2.0, 5.0, 4.0])
    for number in range(50):
        group = draw_group(row, 5, 1, number, 0)
        scores = [row.scores[index - 1] for index in group[1:]]
        assert scores == sorted(scores, reverse=True)


def test_segments_are_reordered_and_the_rest_stays():
    text = np.arange(12)
    assert shuffle_segments(text, 1, 11, (2, 0, 1)).tolist() == [0, 8, 9, 10, 1, 2, 3, 4, 5, 6, 7, 11]
    assert len({tuple(shuffle_segments(text, 1, 11, order)) for order in SEGMENT_ORDERS} - {tuple(text)}) == 5


@given(st.lists(st.integers(2, 60), max_size=30), st.integers(20, 100))
def test_packed_documents(lengths, limit):
    texts = [np.array([0, *range(10, 8 + length), 2]) for length in lengths]
    sequences, sizes = pack_documents(texts, limit, 1)
    assert sum(sizes) == len(texts)
    assert all(len(s) <= limit or size == 1 for s, size in zip(sequences, sizes))
    bodies = [token for text in texts for token in text[1:].tolist()]
    assert [token for sequence in sequences for token in sequence[1:].tolist()] == bodies
    assert all(sequence[0] == 0 and sequence[-1] == 2 for sequence in sequences)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("assemble")
    path = write_jsonl(folder / "d.jsonl", make_records(300, num_negatives=5))
    config = data_config(
        path,
        batch={"global_queries": 24},
        passages_per_query=3,
        segment_shuffle_probability=0.5,
        segment_shuffle_min_tokens=20,
    )
    return open_training_data(config, tokenizer, folder / "store", seed=3)


def shares(data, number, world_size):
    return [data.assembler().share(number, rank, world_size) for rank in range(world_size)]


def samples(drafts) -> dict:
    """row -> its query, passages (after the shuffle) and hashes, of all ranks."""
    found = {}
    for draft in drafts:
        passage, num_queries, all_texts = len(draft.group_sizes), len(draft.group_sizes), draft.texts()
        for query, (row, size) in enumerate(zip(draft.rows.tolist(), draft.group_sizes)):
            texts = [all_texts[query], *all_texts[passage : passage + size]]
            hashes = draft.hashes[passage - num_queries : passage - num_queries + size].tolist()
            found[row] = ([text.tolist() for text in texts], hashes)
            passage += size
    return found


@pytest.mark.parametrize("number", [0, 5, 40])
def test_any_world_size_serves_the_same_samples(data, number):
    whole = samples(shares(data, number, 1))
    assert len(whole) == len(data.plan.batch(number).rows)
    for world_size in (2, 3, 8):
        drafts = shares(data, number, world_size)
        assert all(draft.group_sizes for draft in drafts)
        assert samples(drafts) == whole
        assert len({(d.is_text, d.dataset, d.language, d.in_batch_negatives) for d in drafts}) == 1


def test_shuffle_happens_with_its_probability_and_to_long_passages_only(data):
    changed, long = 0, 0
    for number in range(data.plan.num_batches):
        planned = data.plan.batch(number)
        for row, (texts, hashes) in samples(shares(data, number, 1)).items():
            stored = data.datasets[0].row(row)
            for text, text_hash in zip(texts[1:], hashes):
                original = stored.text(stored.hashes.tolist().index(text_hash)).tolist()
                assert sorted(text) == sorted(original)
                assert text == original or len(text) >= 20
                long, changed = long + (len(text) >= 20), changed + (text != original)
        assert planned.epoch == 0
    assert abs(changed / long - 0.5) < 5 * 0.5 / long**0.5


def test_epochs_draw_other_negatives(data):
    first, second = ({}, {})
    for epoch, found in enumerate((first, second)):
        for index in range(data.plan.num_batches):
            found |= samples(shares(data, epoch * data.plan.num_batches + index, 1))
    assert first.keys() == second.keys()
    assert sum(first[row][1] != second[row][1] for row in first) > len(first) / 2


def test_costs_from_the_index_are_those_of_the_texts(tmp_path, tokenizer):
    """Exact when there is nothing to draw."""
    path = write_jsonl(tmp_path / "d.jsonl", make_records(60, num_negatives=1))
    data = open_training_data(data_config(path, passages_per_query=2), tokenizer, tmp_path / "s", seed=0)
    for number in range(data.plan.num_batches):
        draft = data.assembler().share(number, 0, 1)
        lengths = np.array([len(text) for text in draft.texts()])
        costs = data.assembler().row_costs(data.plan.batch(number))
        assert costs.sum() == pytest.approx(text_cost(lengths).sum())
        assert data.assembler().row_tokens(data.plan.batch(number))[:2].sum() == lengths.sum()


def test_ranks_are_balanced(tmp_path, tokenizer):
    """Within 5 % of ideal: the mean over ranks, or the longest row where that alone is more."""
    path = write_jsonl(tmp_path / "d.jsonl", make_records(800, max_words=120))
    config = data_config(path, batch={"global_queries": 64}, passages_per_query=1)
    data = open_training_data(config, tokenizer, tmp_path / "s", seed=0)
    over = []
    for number in range(data.plan.num_batches):
        loads = [
            float(text_cost(np.array([len(t) for t in draft.texts()])).sum())
            for draft in shares(data, number, 4)
        ]
        ideal = max(np.mean(loads), data.assembler().row_costs(data.plan.batch(number)).max())
        over.append(max(loads) / ideal - 1)
    assert max(over) < 0.05


@given(st.integers(1, 5), st.integers(0, 6), st.integers(1, 4), st.integers(2, 4), st.integers(0, 2**40))
def test_a_group_opens_with_several_distinct_positives(num_positives, num_negatives, size, wanted, row):
    group = draw_group(stored_row(num_positives, num_negatives), size, 5, row, 0, positives_per_query=wanted)
    drawn = min(num_positives, wanted)
    assert len(set(group)) == len(group) == drawn + min(num_negatives, size - 1)
    assert all(1 <= index <= num_positives for index in group[:drawn])
    assert all(index > num_positives for index in group[drawn:])


def test_several_positives_are_drawn_uniformly_and_by_descending_teacher_score():
    counts = np.zeros(5)
    for number in range(2000):
        np.add.at(counts, draw_group(stored_row(4, 0), 1, key_of(0, 0), number, 0, positives_per_query=2), 1)
    assert ((counts[1:] - 1000) ** 2 / 1000).sum() < 30
    row = stored_row(3, 3, scores=[1.0, 3.0, 2.0, 4.0, 6.0, 5.0])
    assert draw_group(row, 4, 1, 7, 0, positives_per_query=3) == [2, 3, 1, 5, 6, 4]


@pytest.fixture(scope="module")
def several(tmp_path_factory, tokenizer):
    """Records with one to three positives, all of one length within a record, and one negative."""
    folder, records = tmp_path_factory.mktemp("several"), make_records(90, num_negatives=1)
    for number, record in enumerate(records):
        words = record["pos"][0].split()
        record["pos"] = [" ".join(words[k:] + words[:k]) for k in range(min(1 + number % 3, len(words)))]
    path = write_jsonl(folder / "d.jsonl", records)
    config = data_config(path, passages_per_query=2, positives_per_query=2)
    return open_training_data(config, tokenizer, folder / "store", seed=3), config, folder / "store"


def test_drawn_positives_open_the_groups_on_any_number_of_ranks(several):
    data, _, _ = several
    seen = set()
    for number in range(data.plan.num_batches):
        whole = samples(shares(data, number, 1))
        assert samples(shares(data, number, 3)) == whole
        (draft,) = shares(data, number, 1)
        stored = [data.datasets[0].row(row) for row in draft.rows.tolist()]
        drawn = [min(2, row.num_positives) for row in stored]
        assert (draft.positive_counts.tolist() or [1] * len(drawn)) == drawn
        assert draft.group_sizes == [count + 1 for count in drawn]
        for count, row, (_, hashes) in zip(drawn, stored, (whole[r] for r in draft.rows.tolist())):
            assert set(hashes[:count]) <= set(row.hashes[1 : 1 + row.num_positives].tolist())
        seen |= set(drawn)
        lengths = np.array([len(text) for text in draft.texts()])
        counted = data.assembler().row_tokens(data.plan.batch(number))
        assert counted[2].sum() == len(draft.hashes)
        # cut words make the positives of a record differ by a token or two
        assert abs(int(counted[:2].sum()) - int(lengths.sum())) <= 2 * len(drawn)
    assert seen == {1, 2}


def test_how_many_positives_are_drawn_is_part_of_the_plan(several, tokenizer):
    data, config, store = several
    one = config.model_copy(update={"positives_per_query": 1})
    other = open_training_data(one, tokenizer, store, seed=3)
    assert other.plan.fingerprint != data.plan.fingerprint
    assert other.assembler().share(0, 0, 1).positive_counts.tolist() == []
    again = open_training_data(config, tokenizer, store, seed=3)
    assert again.plan.fingerprint == data.plan.fingerprint


def test_a_token_budget_leaves_room_for_every_drawn_positive(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", make_records(4))
    config = data_config(path, batch={"global_tokens": 4096}, passages_per_query=2)
    edges = [16, 32, 64, 128]
    for wanted in (1, 3):
        steps = queries_in_buckets(config.model_copy(update={"positives_per_query": wanted}), 2)
        sizes = [4096 // (min(edge, 32) + (1 + wanted) * edge) for edge in edges]
        assert [step.queries for step in steps] == sizes
        assert [step.passages for step in steps] == [size * (1 + wanted) for size in sizes]
