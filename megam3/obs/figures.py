"""What each figure of metrics.jsonl means: the one table that `megam3 explain` and the documentation read.

A name holds `*` where it stands for several: a head, a test set, a length. Values are those of the line's own
step, speeds those since the line before; losses and accuracies are means over the queries of all ranks. (The
terminal shows means over the steps since its line before.)
"""

from __future__ import annotations

from fnmatch import fnmatchcase

_HEADS = "* is dense, lexical, multi_vector or sum"

FIGURES = {
    "loss/total": "what the step minimises: the weighted losses below, each divided as the recipe says",
    "loss/dense": "InfoNCE of the dense scores, in nats a query; log(passages of a step) is chance",
    "loss/lexical": "the same of the lexical scores",
    "loss/multi_vector": "the same of the multi-vector scores",
    "loss/sum": "the same of the weighted sum of the three scores",
    "loss/distill_*": "cross-entropy of a head's softmax against the combined score's (self-distillation)",
    "loss/teacher_*": f"loss against the teacher scores of the records (objective.teacher); {_HEADS}",
    "loss/dense_*": "InfoNCE of the dense vector cut to * dimensions (objective.matryoshka_dims)",
    "loss/passage_to_query": "InfoNCE of passages choosing among queries (objective.both_directions)",
    "loss/sparsity_*": "what objective.sparsity adds for the weights of queries, and of passages",
    "loss/encoder": "pretraining: cross-entropy of the encoder's masked tokens, in nats a token",
    "loss/decoder": "pretraining: cross-entropy of the decoder's tokens, in nats a token",
    "loss/bag_of_words": "pretraining: cross-entropy of a text's words from its vector, in nats a token",
    "accuracy/*": f"share of queries whose positive scores above all other passages, no tie; {_HEADS}",
    "lexical/nonzero_share": "share of token weights above 0 in the batch; 0: the head is dead",
    "lexical/mean_weight": "mean token weight in the batch",
    "dense/spread": "1 - |mean|² of the passages' vectors: 0 when all are equal, near 1 when spread",
    "multi_vector/spread": "the same of the passages' token vectors",
    "optim/grad_norm": "norm of the whole gradient before clipping",
    "optim/lr": "learning rate of the encoder; heads follow the same curve",
    "optim/loss_scale": "factor on the loss in fp16",
    "speed/tokens_per_second": "tokens of all ranks a second, without saving and evaluation",
    "speed/matmul_peak_share": "share of the device's measured peak of matrix products that the model used",
    "speed/data_wait_share": "share of the time in which training waited for its next batch",
    "memory/peak_bytes": "most memory so far: tensors on a GPU, the whole process on a CPU",
    "data/samples": "queries, or texts for pretraining, of all ranks",
    "data/tokens": "tokens of all ranks",
    "data/truncated_texts": "texts that were cut at their limit",
    "data/padding_avoided_share": "share of padded batches that would be padding, which is not computed",
    "eval/*/*/*": "evaluation: eval/TEST SET/MODE/METRIC, from 0 to 1",
}


def meaning(name: str) -> str | None:
    """What a figure means, by the most exact name that covers it; None: no such figure.

    >>> meaning("accuracy/dense")[:16]
    'share of queries'
    """
    found = [pattern for pattern in FIGURES if fnmatchcase(name, pattern)]
    return FIGURES[max(found, key=lambda pattern: len(pattern.replace("*", "")))] if found else None
