"""Regularisers of lexical weights over the global batch, from (id, weight) pairs alone: nothing N × V.

    flops   Σ_v a_v²,   a_v = (1/N) Σ over all ranks' N texts of w(text, v)   (arXiv 2004.05665, equation 4)
    l1      (1/N) Σ over texts Σ_v w(text, v)

FLOPS needs the other ranks' means: one all-reduce of V numbers, which carries no graph. Its gradient,
∂/∂w = 2·a_v / N, is handed to the own pairs, times W, because the engine takes the mean over ranks
(`megam3.dist.gather`). Two texts {7: 1., 9: 3.} and {9: 1.}: a = {7: .5, 9: 2.}, flops = 4.25, l1 = 2.5.
"""

from torch import Tensor

from megam3.batch import Representations
from megam3.config.weights import SparsityConfig
from megam3.dist import comm


def ramp(step: int, ramp_steps: int) -> float:
    """Share of the full weight at 0-based optimizer step `step`: quadratic, then 1."""
    return min(1.0, (step + 1) ** 2 / ramp_steps**2)


def sparsity(texts: Representations, kind: str, num_texts: int) -> Tensor:
    """The regulariser of these texts of this rank among `num_texts` of all ranks; collective.

    The mean over ranks of the values is the figure of the global batch, and so are the gradients' means.
    """
    weights_Z, ids_Z = texts.lexical_weights_Z, texts.lexical_ids_Z
    scale = comm.world_size() / max(1, num_texts)
    if kind == "l1":
        return weights_Z.sum() * scale
    # ranks must sum tables of one size; the largest id of the batch is enough
    size = comm.max_over_ranks(int(ids_Z.max()) + 1 if ids_Z.numel() else 1)
    summed_V = weights_Z.new_zeros(size).index_add_(0, ids_Z, weights_Z.detach())
    mean_V = comm.all_reduce_sum(summed_V) / max(1, num_texts)
    surrogate = 2 * scale * (mean_V[ids_Z] * weights_Z).sum()
    return mean_V.square().sum() + (surrogate - surrogate.detach())


def sparsity_loss(
    queries: Representations,
    passages: Representations,
    config: SparsityConfig,
    num_queries: int,
    num_passages: int,
    step: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What is added to the loss at optimizer step `step`, and both terms before their weights, detached.

    Args:
        num_queries, num_passages: of all ranks.
    """
    of_queries = sparsity(queries, config.kind, num_queries)
    of_passages = sparsity(passages, config.kind, num_passages)
    share = ramp(step, config.ramp_steps)
    total = share * (config.query_weight * of_queries + config.passage_weight * of_passages)
    named = {"sparsity_query": of_queries, "sparsity_passage": of_passages}
    return total, {name: value.detach() for name, value in named.items()}
