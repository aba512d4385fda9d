"""Matryoshka and both directions against loops over all ranks' texts, whole and in tiles, in float64."""

import pytest
import torch
from torch.nn.functional import log_softmax, normalize

from megam3.config.objective import UnifiedConfig
from megam3.dist import comm
from megam3.dist.gather import gather_rows
from megam3.loss.dense import add_dense_losses
from megam3.loss.negatives import Negatives
from megam3.loss.settings import resolve_settings
from megam3.loss.unified import retrieval_loss
from megam3.scoring.combine import count_over_ranks
from tests.ranks import run_ranks
from tests.representations import random_representations

GROUPS = ([2, 1, 3], [1, 2])
HASHES = ([5, 1, 2, 3, 7, 5], [2, 4, 8])
"""Positives are passages 0, 2, 3 and 0, 1: the text 2 is drawn by a query of either rank."""
TAU = 0.3
CONFIG = UnifiedConfig(
    heads=["dense"],
    temperature=TAU,
    matryoshka_dims=[2, 5],
    matryoshka_weights=[0.5, 2.0],
    both_directions=True,
)


def one_rank(config: UnifiedConfig, tiles: str, in_batch: bool, distill: bool = False) -> dict:
    rank = comm.rank()
    sizes, hashes = GROUPS[rank], torch.tensor(HASHES[rank])
    queries, passages = (
        random_representations(len(sizes), 30 + rank),
        random_representations(sum(sizes), 40 + rank),
    )
    counts, settings = count_over_ranks(queries, passages), resolve_settings(config)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    first = counts.first_passage if in_batch else 0
    negatives = Negatives(
        positive_column_Q=offsets[:-1] + first,
        group_stop_Q=offsets[1:] + first,
        passage_hash_P=gather_rows(hashes) if in_batch else hashes,
        known_positive_hash_QM=hashes[offsets[:-1]][:, None],
        in_batch_negatives=in_batch,
    )
    shared = {"negatives": negatives, "settings": settings, "counts": counts, "tiles": tiles}
    plain = retrieval_loss(queries, passages, **shared, distill=distill)
    terms = add_dense_losses(plain, queries, passages, **shared)
    grads = torch.autograd.grad(terms.total, (queries.dense_ND, passages.dense_ND))
    means = {name: comm.all_reduce_sum(x) / comm.world_size() for name, x in terms.terms.items()}
    return {
        "plain": comm.all_reduce_sum(plain.total.detach()) / comm.world_size(),
        "total": comm.all_reduce_sum(terms.total.detach()) / comm.world_size(),
        "terms": means,
        "accuracy": list(terms.accuracy),
        # W times the gradient of the mean loss arrives at each representation
        "grads": [gather_rows(grad) / comm.world_size() for grad in grads],
    }


def written_out(world_size: int, in_batch: bool, dims: dict[int, float], both: bool):
    """Dense loss, what is added to it, and their gradients, one query at a time."""
    ranks = range(world_size)
    queries = torch.cat([random_representations(len(GROUPS[r]), 30 + r).dense_ND for r in ranks])
    passages = torch.cat([random_representations(sum(GROUPS[r]), 40 + r).dense_ND for r in ranks])
    leaves = [x.detach().requires_grad_() for x in (queries, passages)]
    hashes = [h for r in ranks for h in HASHES[r]]
    sizes = [size for r in ranks for size in GROUPS[r]]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def infonce(q, p):
        losses = []
        for i, start in enumerate(starts):
            own = range(start, start + sizes[i])
            seen = [
                c
                for c in (range(len(hashes)) if in_batch else own)
                if c == start or hashes[c] != hashes[start]
            ]
            losses.append(-log_softmax(p[seen] @ q[i] / TAU, 0)[seen.index(start)])
        return torch.stack(losses).mean()

    def backwards(q, p):
        losses = []
        for i, start in enumerate(starts):
            seen = [j for j, s in enumerate(starts) if j == i or hashes[s] != hashes[start]]
            losses.append(-log_softmax(q[seen] @ p[start] / TAU, 0)[seen.index(i)])
        return torch.stack(losses).mean()

    terms = {"dense": infonce(*leaves)}
    for dim in dims:
        terms[f"dense_{dim}"] = infonce(*(normalize(x[:, :dim], dim=1) for x in leaves))
    if both and in_batch:
        terms["passage_to_query"] = backwards(*leaves)
    added = sum(weight * terms[f"dense_{dim}"] for dim, weight in dims.items()) / max(1, len(dims))
    total = terms["dense"] + added + terms.get("passage_to_query", 0.0)
    return total, terms, torch.autograd.grad(total, leaves)


CASES = [(CONFIG, tiles, in_batch) for tiles in ("never", "always") for in_batch in (True, False)]


def every_case() -> list[dict]:
    return [one_rank(*case) for case in CASES]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_and_gradients_equal_the_loops(world_size):
    for (_, tiles, in_batch), result in zip(CASES, run_ranks(every_case, world_size)[-1], strict=True):
        total, terms, grads = written_out(world_size, in_batch, {2: 0.5, 5: 2.0}, both=True)
        case = f"tiles {tiles}, in batch {in_batch}"
        torch.testing.assert_close(result["total"], total.detach(), rtol=1e-11, atol=1e-13, msg=case)
        assert list(result["terms"]) == list(terms) == result["accuracy"], case
        for name, value in terms.items():
            torch.testing.assert_close(
                result["terms"][name], value.detach(), rtol=1e-11, atol=1e-13, msg=f"{case}: {name}"
            )
        for ours, theirs in zip(result["grads"], grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=case)


@pytest.mark.parametrize(("distill", "share"), [(False, 1 / 4), (True, 1 / 8)])
def test_beside_other_heads_it_has_the_weight_of_the_dense_loss(distill, share):
    config = CONFIG.model_copy(update={"heads": ["dense", "lexical", "multi_vector"]})
    result = one_rank(config, "auto", True, distill)
    terms = result["terms"]
    added = (0.5 * terms["dense_2"] + 2.0 * terms["dense_5"]) / 2 + terms["passage_to_query"]
    torch.testing.assert_close(result["total"] - result["plain"], share * added, rtol=1e-11, atol=1e-13)


def test_the_full_width_is_the_dense_loss_itself():
    terms = one_rank(UnifiedConfig(temperature=TAU, matryoshka_dims=[5]), "auto", True)["terms"]
    torch.testing.assert_close(terms["dense_5"], terms["dense"], rtol=1e-12, atol=1e-14)


def test_nothing_is_added_by_default_and_weights_default_to_one():
    settings = resolve_settings(UnifiedConfig())
    assert (settings.matryoshka, settings.both_directions) == ({}, False)
    assert resolve_settings(UnifiedConfig(matryoshka_dims=[2, 4])).matryoshka == {2: 0.5, 4: 0.5}
