from dataclasses import replace

import pytest
import torch

from megam3.batch import RetrievalBatch
from megam3.dist import comm
from megam3.loss.negatives import find_negatives, group_rows, share_known_positives
from megam3.packed_texts import pack_texts
from megam3.scoring.combine import RankCounts
from tests.ranks import run_ranks


def _batch(sizes, hashes, in_batch_negatives=True):
    texts = pack_texts([[0, 2]] * (len(sizes) + sum(sizes)))
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return RetrievalBatch(
        texts=texts,
        group_offsets_Q1=offsets,
        rows_Q=torch.arange(len(sizes)),
        passage_hashes_P=torch.tensor(hashes),
        in_batch_negatives=in_batch_negatives,
    )


def _naive(sizes, hashes, in_batch, mask):
    """One pair at a time."""
    group = [query for query, size in enumerate(sizes) for _ in range(size)]
    positive = [group.index(query) for query in range(len(sizes))]
    return [
        [
            column == positive[query]
            or (
                (in_batch or group[column] == query)
                and not (mask and hashes[column] == hashes[positive[query]])
            )
            for column in range(len(hashes))
        ]
        for query in range(len(sizes))
    ]


SIZES, HASHES = [2, 1, 3], [7, 8, 7, 9, 9, 7]


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("mask", [True, False])
def test_visible_equals_the_loop_also_in_tiles(in_batch, mask):
    negatives = find_negatives(_batch(SIZES, HASHES, in_batch), mask)
    expected = torch.tensor(_naive(SIZES, HASHES, in_batch, mask))
    assert torch.equal(negatives.visible(), expected)
    assert torch.equal(negatives.visible(slice(1, 3), slice(2, 5)), expected[1:3, 2:5])
    assert negatives.positive_column_Q.tolist() == [0, 2, 3]


def test_equal_texts_are_never_negatives():
    # passage 2 is query 0's positive under another query; 4 equals query 2's positive inside its own group
    visible = find_negatives(_batch(SIZES, HASHES), True).visible()
    assert visible.tolist()[0] == [True, True, False, True, True, False]
    assert visible.tolist()[2] == [True, True, True, True, False, True]


def test_groups_side_by_side():
    negatives = find_negatives(_batch(SIZES, HASHES), True)
    columns, exists = negatives.group_columns()
    assert columns.tolist() == [[0, 1, 1], [2, 2, 2], [3, 4, 5]]
    assert exists.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    batch = _batch(SIZES, HASHES)
    rows = group_rows(torch.arange(6.0), batch.group_offsets_Q1, batch.group_sizes, fill=-1.0)
    assert rows.tolist() == [[0.0, 1.0, -1.0], [2.0, -1.0, -1.0], [3.0, 4.0, 5.0]]


def _counts(queries, passages):
    nothing = (0,) * sum(queries)
    return RankCounts(queries=queries, passages=passages, pairs_by_query=nothing, rows_by_query=nothing)


def _on_a_rank():
    batch = _batch(SIZES[:2], HASHES[:3]) if comm.rank() == 0 else _batch(SIZES[2:], HASHES[3:])
    negatives = find_negatives(batch, True, _counts((2, 1), (3, 3)))
    return [
        negatives.visible().tolist(),
        negatives.positive_column_Q.tolist(),
        find_negatives(batch, True).num_passages,
    ]


@pytest.mark.ranks
def test_two_ranks_see_what_one_rank_sees():
    expected = _naive(SIZES, HASHES, True, True)
    assert run_ranks(_on_a_rank, 2) == [[expected[:2], [0, 2], 3], [expected[2:], [3], 3]]


def test_no_queries():
    batch = _batch([], torch.zeros(0, dtype=torch.int64).tolist())
    negatives = find_negatives(
        replace(batch, passage_hashes_P=torch.zeros(0, dtype=torch.int64)),
        True,
    )
    assert negatives.visible().shape == (0, 0)
    assert negatives.group_columns()[0].shape == (0, 0)


def test_every_known_positive_of_a_query_is_no_negative():
    # query 0 also knows text 9 (columns 3 and 4), query 2 text 8 (column 1); query 1 has one positive,
    # repeated
    known = torch.tensor([[7, 9], [7, 7], [9, 8]])
    batch = replace(_batch(SIZES, HASHES), known_positive_hashes_QM=known)
    negatives = find_negatives(batch, True)
    naive = [
        [
            column == positive or hash_ not in {*known[query].tolist(), HASHES[positive]}
            for column, hash_ in enumerate(HASHES)
        ]
        for query, positive in enumerate([0, 2, 3])
    ]
    assert negatives.visible().tolist() == naive
    assert negatives.visible()[0].tolist() == [True, True, False, False, False, False]
    columns, exists = negatives.group_columns()
    in_group = negatives.visible_in_group()
    assert torch.equal(in_group & exists, negatives.visible().gather(1, columns) & exists)
    assert find_negatives(batch, False).visible().all()


ASKED, KNOWN = [11, 12, 11, 13, 12], [[1, 2], [5, 5], [3, 3], [4, 4], [6, 5]]
"""Query texts of five rows, and the known positives of each: 11 and 12 are asked twice."""
SHARED = [{1, 2, 3}, {5, 6}, {1, 2, 3}, {4}, {5, 6}]


def _shared_on_a_rank():
    own = slice(0, 2) if comm.rank() == 0 else slice(2, 5)
    # the second rank's records have one positive more, so widths differ
    known = torch.tensor(KNOWN)[own] if comm.rank() else torch.tensor(KNOWN)[own, :1]
    counts = replace(_counts((2, 3), (2, 3)), query_hashes=torch.tensor(ASKED))
    return share_known_positives(known, torch.tensor(ASKED)[own], counts).tolist()


@pytest.mark.ranks
def test_rows_that_ask_the_same_share_their_known_positives_over_ranks():
    first, second = run_ranks(_shared_on_a_rank, 2)
    # only what was drawn is known of the rows of rank 0 here
    assert [set(row) for row in first] == [{1, 3}, {5, 6}]
    assert [set(row) for row in second] == [{1, 3}, {4}, {5, 6}]
    assert [row[0] for row in first + second] == [row[0] for row in KNOWN]


def test_rows_that_ask_the_same_share_their_known_positives():
    known = torch.tensor(KNOWN)
    shared = share_known_positives(known, torch.tensor(ASKED), None)
    assert [set(row) for row in shared.tolist()] == SHARED
    assert shared[:, 0].tolist() == known[:, 0].tolist()
    # nothing asked twice: nothing changes, nothing is exchanged
    assert share_known_positives(known, torch.arange(5), None) is known


def test_the_positive_of_another_row_that_asks_the_same_is_no_negative():
    batch = replace(_batch([2, 2], [1, 9, 2, 8]), query_hashes_Q=torch.tensor([4, 4]))
    assert find_negatives(batch, True).visible().tolist() == [
        [True, True, False, True],
        [False, True, True, True],
    ]
    assert find_negatives(batch, False).visible().all()
    others = replace(batch, query_hashes_Q=torch.tensor([4, 5]))
    assert find_negatives(others, True).visible().all()
