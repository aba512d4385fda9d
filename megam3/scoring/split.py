"""Cut representations into runs of texts, so that gradients of all runs come back in one concatenation."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from megam3.batch import Representations


def split_texts(representations: Representations, sizes: Sequence[int]) -> list[Representations]:
    """Consecutive runs of `sizes` texts, which add up to all of them; one look at the offsets for all runs, gradients flow.

    `Representations.select` per run would, in the backward pass, make a tensor of the whole size for every run.
    """
    edges = [0]
    for size in sizes:
        edges.append(edges[-1] + size)
    assert edges[-1] == representations.num_texts, "the runs must cover all texts"
    lexical, multi = representations.lexical_offsets_N1, representations.multi_offsets_N1
    first_pair, first_row = torch.stack([lexical[edges], multi[edges]]).tolist()
    dense = representations.dense_ND.split(list(sizes))
    pairs = [stop - start for start, stop in zip(first_pair, first_pair[1:])]
    rows = [stop - start for start, stop in zip(first_row, first_row[1:])]
    weights, ids = representations.lexical_weights_Z.split(pairs), representations.lexical_ids_Z.split(pairs)
    vectors = representations.multi_KC.split(rows)
    return [
        Representations(
            dense[run],
            weights[run],
            ids[run],
            lexical[edges[run] : edges[run + 1] + 1] - first_pair[run],
            vectors[run],
            multi[edges[run] : edges[run + 1] + 1] - first_row[run],
        )
        for run in range(len(sizes))
    ]


def keep_heads(representations: Representations, heads: Collection[str]) -> Representations:
    """The same texts with no lexical pairs or multi-vector rows where that head is not named: nothing of it is moved or scored."""
    kept = representations
    none = kept.lexical_offsets_N1.new_zeros(kept.num_texts + 1)
    if "lexical" not in heads:
        kept = replace(
            kept,
            lexical_weights_Z=kept.lexical_weights_Z[:0],
            lexical_ids_Z=kept.lexical_ids_Z[:0],
            lexical_offsets_N1=none,
        )
    if "multi_vector" not in heads:
        kept = replace(kept, multi_KC=kept.multi_KC[:0], multi_offsets_N1=none)
    return kept
