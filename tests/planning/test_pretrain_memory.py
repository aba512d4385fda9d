"""The planned peak of a RetroMAE step against the peak of one that ran."""

import pytest

from tests.planning.pretrain_probe import probe

CASES = {
    # layers, decoder and rows of the masked-LM head
    "narrow vocabulary": {"vocab_size": 600, "num_texts": 16, "tokens": 256},
    # logits of a chunk and the fp32 gradient of the embedding matrix
    "wide vocabulary": {"vocab_size": 16_000, "num_texts": 8, "tokens": 256},
    # three tensors of logits, and a second gradient of that matrix
    "bag of words": {"vocab_size": 16_000, "num_texts": 8, "tokens": 256, "bag": 1.0},
}


@pytest.mark.parametrize("name", CASES)
def test_the_planned_peak_is_near_the_measured_one_and_not_far_below(name: str) -> None:
    found = probe({"hidden_size": 256, "num_layers": 4, **CASES[name]})
    assert 0.95 <= found["planned"] / found["measured"] <= 1.1, found
