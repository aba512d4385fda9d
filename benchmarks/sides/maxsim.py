"""MaxSim forward and backward, or, as its yardstick, ONE plain product of the same rows (forward only).

Spec: work (maxsim or matmul), num_queries, query_rows, num_passages, passage_rows, width; optional threads.
"""

import torch

from benchmarks.worker import Step, serve
from megam3.model.heads import normalize_rows
from megam3.scoring.maxsim import maxsim_scores


def build(spec: dict) -> Step:
    """Rows of equal counts: the product has num_queries·query_rows × num_passages·passage_rows entries, which
    only the yardstick keeps."""
    generator = torch.Generator().manual_seed(0)
    query_offsets = torch.arange(spec["num_queries"] + 1) * spec["query_rows"]
    passage_offsets = torch.arange(spec["num_passages"] + 1) * spec["passage_rows"]
    query_KC = normalize_rows(torch.randn(int(query_offsets[-1]), spec["width"], generator=generator))
    passage_KC = normalize_rows(torch.randn(int(passage_offsets[-1]), spec["width"], generator=generator))
    upstream_QP = torch.randn(spec["num_queries"], spec["num_passages"], generator=generator)

    def matmul() -> dict:
        torch.mm(query_KC, passage_KC.T)
        return {}

    def maxsim() -> dict:
        queries, passages = query_KC.clone().requires_grad_(), passage_KC.clone().requires_grad_()
        maxsim_scores(queries, query_offsets, passages, passage_offsets).backward(upstream_QP)
        return {}

    return {"matmul": matmul, "maxsim": maxsim}[spec["work"]]


if __name__ == "__main__":
    serve(build)
