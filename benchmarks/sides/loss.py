"""The unified loss alone, forward and backward, on random representations: its figures are the loss and the
norms of the gradients.

Spec: num_queries, num_passages (a multiple), query_rows, passage_rows (about as many lexical pairs), width of
dense and multi-vector rows; optional heads ("all" or "dense"), tiles (form the loss without score matrices),
distill, world_size (each rank has this much), threads.
"""

import torch

from benchmarks.ranks import await_answer, meet, own_rank
from benchmarks.worker import Step, serve
from megam3.batch import Representations
from megam3.config.objective import UnifiedConfig
from megam3.config.weights import LossWeights
from megam3.dist.gather import gather_rows
from megam3.loss.negatives import Negatives
from megam3.loss.rows import LossTerms
from megam3.loss.settings import LossSettings, resolve_settings
from megam3.loss.tiled import tiled_unified_loss
from megam3.loss.unified import unified_loss
from megam3.model.heads import normalize_rows
from megam3.scoring.combine import RankCounts, count_over_ranks, score_global

NUM_IDS = 20_000
"""Ids that texts draw from: two texts share some."""


def make_representations(
    num_texts: int, num_rows: int, width: int, generator: torch.Generator
) -> Representations:
    """Texts of num_rows multi-vector rows and almost as many (id, weight) pairs; all floats are leaves."""
    text_Z = torch.arange(num_texts).repeat_interleave(num_rows)
    keys = torch.unique(text_Z * NUM_IDS + torch.randint(NUM_IDS, text_Z.shape, generator=generator))
    pairs_N = torch.bincount(keys // NUM_IDS, minlength=num_texts)
    return Representations(
        dense_ND=normalize_rows(torch.randn(num_texts, width, generator=generator)).requires_grad_(),
        lexical_weights_Z=torch.rand(keys.shape[0], generator=generator).requires_grad_(),
        lexical_ids_Z=keys % NUM_IDS,
        lexical_offsets_N1=torch.cat([pairs_N.new_zeros(1), pairs_N.cumsum(0)]),
        multi_KC=normalize_rows(
            torch.randn(num_texts * num_rows, width, generator=generator)
        ).requires_grad_(),
        multi_offsets_N1=torch.arange(num_texts + 1) * num_rows,
    )


def make_negatives(counts: RankCounts, num_queries: int, num_passages: int) -> Negatives:
    """Groups of equal size, every text different."""
    start_Q = counts.first_passage + torch.arange(num_queries) * (num_passages // num_queries)
    hash_P = gather_rows(counts.first_passage + torch.arange(num_passages), counts.passages)
    return Negatives(
        positive_column_Q=start_Q,
        group_stop_Q=start_Q + num_passages // num_queries,
        passage_hash_P=hash_P,
        known_positive_hash_QM=start_Q[:, None],
    )


def whole_loss(
    queries: Representations,
    passages: Representations,
    negatives: Negatives,
    settings: LossSettings,
    counts: RankCounts,
    distill: bool,
) -> LossTerms:
    """Through whole score matrices."""
    scores = score_global(queries, passages, settings.sum_weights, heads=settings.heads, counts=counts)
    scale = len(counts.queries) / sum(counts.queries)
    return unified_loss(
        scores.by_name(), negatives.positive_column_Q, negatives.visible(), settings, scale, distill
    )


def build(spec: dict) -> Step:
    """See the module's docstring."""
    rank, world_size = own_rank(), spec.get("world_size", 1)
    other_ranks = meet("loss", rank, world_size) if world_size > 1 else []
    generator = torch.Generator().manual_seed(rank)
    queries = make_representations(spec["num_queries"], spec["query_rows"], spec["width"], generator)
    passages = make_representations(spec["num_passages"], spec["passage_rows"], spec["width"], generator)
    dense_alone = UnifiedConfig(
        preset="joint", loss_weights=LossWeights(dense=1.0, lexical=0.0, multi_vector=0.0)
    )
    settings = resolve_settings(dense_alone if spec.get("heads") == "dense" else UnifiedConfig())
    counts = count_over_ranks(queries, passages)
    negatives = make_negatives(counts, spec["num_queries"], spec["num_passages"])
    loss = tiled_unified_loss if spec.get("tiles") else whole_loss
    leaves = {
        f"{side} {name}": x
        for side, texts in (("query", queries), ("passage", passages))
        for name, x in _named(texts)
    }

    def step() -> dict:
        for process in other_ranks:
            process.stdin.write("\n")
        for leaf in leaves.values():
            leaf.grad = None
        terms = loss(queries, passages, negatives, settings, counts, spec.get("distill", False))
        terms.total.backward()
        for process in other_ranks:
            await_answer(process)
        norms = {name: float(leaf.grad.norm()) for name, leaf in leaves.items() if leaf.grad is not None}
        # a head that is not trained has no gradient, or one of zeros
        return {
            "loss": terms.total.item(),
            "gradient_norms": {name: norm for name, norm in norms.items() if norm},
        }

    for process in other_ranks:
        await_answer(process)
    return step


def _named(texts: Representations) -> list[tuple[str, torch.Tensor]]:
    return list(zip(("dense", "lexical", "multi-vector"), texts.floats()))


if __name__ == "__main__":
    serve(build)
