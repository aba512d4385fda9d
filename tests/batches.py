"""Small retrieval batches, whole or split over ranks, for tests of objectives, engine and trainer."""

from collections.abc import Sequence

import torch

from megam3.batch import RetrievalBatch
from megam3.packed_texts import pack_texts
from tests.factory import random_token_ids


def make_groups(
    num_queries: int, passages_per_query: int = 3, *, seed: int = 0, vocab_size: int = 300
) -> list[list[list[int]]]:
    """Per query: its token ids, then those of its passages, positive first; lengths are ragged."""
    generator = torch.Generator().manual_seed(seed)
    groups = []
    for index in range(num_queries):
        lengths = [int(torch.randint(3, 8, (), generator=generator))]
        lengths += torch.randint(4, 20, (passages_per_query,), generator=generator).tolist()
        groups.append(random_token_ids(lengths, vocab_size=vocab_size, seed=1000 * seed + index))
    return groups


def batch_of(
    groups: Sequence[Sequence[Sequence[int]]], *, first_row: int = 0, in_batch_negatives: bool = True
) -> RetrievalBatch:
    """The groups as one rank's batch."""
    passages = [passage for group in groups for passage in group[1:]]
    sizes = torch.tensor([0, *(len(group) - 1 for group in groups)])
    return RetrievalBatch(
        texts=pack_texts([group[0] for group in groups] + passages),
        group_offsets_Q1=sizes.cumsum(0),
        rows_Q=torch.arange(first_row, first_row + len(groups)),
        passage_hashes_P=torch.tensor([hash(tuple(p)) for p in passages]),
        in_batch_negatives=in_batch_negatives,
    )


def split_over_ranks(groups: Sequence, rank: int, world_size: int) -> RetrievalBatch:
    """This rank's contiguous share of the groups."""
    share = len(groups) // world_size
    return batch_of(groups[rank * share : (rank + 1) * share], first_row=rank * share)
