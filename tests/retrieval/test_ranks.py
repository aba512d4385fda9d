"""Two ranks find what one finds, with different numbers of passages and batches on each."""

import pytest

from megam3.config.schema import EvaluationConfig
from megam3.dist import comm
from megam3.retrieval.encode import encode_batches
from megam3.retrieval.evaluate import MODES, evaluate
from tests.ranks import run_ranks
from tests.retrieval.toys import encode_ids, tokenize, toy_dataset

CONFIG = EvaluationConfig(rerank_dense=12, rerank_hybrid=10, batch_tokens=60)


def _metrics(num_passages):
    calls = []

    def counting(token_ids):
        calls.append(len(token_ids))
        return encode_ids(token_ids)

    result = evaluate(toy_dataset(num_passages=num_passages), tokenize, counting, CONFIG)
    batches = [len(batch) for batch, _ in encode_batches(counting, [[0, 5, 2]] * (1 + 9 * comm.rank()), 3)]
    return [
        [result.modes[mode].overall for mode in MODES],
        [result.modes[mode].by_language for mode in MODES],
        len(calls),
        batches,
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("num_passages", [71, 1])
def test_two_ranks_equal_one(num_passages):
    alone = _metrics(num_passages)
    first, second = run_ranks(_metrics, 2, num_passages)
    assert first[:2] == second[:2] == alone[:2]
    assert first[2] == second[2], "every rank must enter equally many forward passes"
    assert (len(first[3]), len(second[3])) == (1, 10)
