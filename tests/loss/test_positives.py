"""Several drawn positives a query against loops over all ranks' texts, whole and in tiles, in float64."""

import math
from dataclasses import replace

import pytest
import torch

from megam3.batch import RetrievalBatch, join_representations
from megam3.config.objective import UnifiedConfig
from megam3.dist import comm
from megam3.dist.gather import gather_rows
from megam3.loss.dense import add_dense_losses
from megam3.loss.distillation import TeacherGroups
from megam3.loss.negatives import find_negatives, group_rows
from megam3.loss.positives import Positives, hit_rows, infonce_rows
from megam3.loss.settings import NAMES, resolve_settings
from megam3.loss.unified import retrieval_loss
from megam3.packed_texts import pack_texts
from megam3.scoring.combine import count_over_ranks
from tests.ranks import run_ranks
from tests.representations import naive_scores, random_representations

SIZES = ([4, 2, 2], [3, 1])
DRAWN = ([2, 1, 1], [2, 1])
"""Positives that open each group."""
HASHES = ([1, 2, 9, 5, 3, 8, 1, 7], [1, 4, 6, 8])
"""Text 1 is drawn by queries 0 and 2 of the first rank and by query 0 of the second."""
KNOWN = ([[1, 2, 6], [3, 3, 3], [1, 1, 1]], [[1, 4], [8, 8]])
"""Text 6, a hard negative of the second rank, is a positive of query 0 that was not drawn."""
ASKED = ([21, 22, 23], [24, 22])
"""Query 1 of the second rank asks what query 1 of the first does."""
TAU = 0.5
LOSS = {"dense": 1.0, "lexical": 0.1, "multi_vector": 1.0, "sum": 1.0}
DISTILL = {"dense": 1.0, "lexical": 0.1, "multi_vector": 1.0}
CONFIGS = [
    UnifiedConfig(temperature=TAU, self_distill=False, both_directions=True),
    UnifiedConfig(temperature=TAU),
    UnifiedConfig(temperature=TAU, teacher="kl_div", false_negative_margin=0.1),
    UnifiedConfig(temperature=TAU, teacher="m3_kd_loss", self_distill=False),
    UnifiedConfig(
        temperature=TAU,
        self_distill=False,
        false_negative_margin=0.3,
        false_negative_margin_source="teacher",
    ),
]
CASES = [
    (config, tiles, in_batch)
    for config in CONFIGS
    for tiles in ("never", "always")
    for in_batch in (True, False)
]


def texts_of(rank: int):
    num_queries, num_passages = len(SIZES[rank]), sum(SIZES[rank])
    return random_representations(num_queries, 30 + rank), random_representations(num_passages, 40 + rank)


def taught_of(rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(60 + rank)
    return torch.randn(sum(SIZES[rank]), generator=generator, dtype=torch.float64)


def batch_of(rank: int, in_batch: bool) -> RetrievalBatch:
    sizes = SIZES[rank]
    return RetrievalBatch(
        texts=pack_texts([[0, 2]] * (len(sizes) + sum(sizes))),
        group_offsets_Q1=torch.tensor([0, *sizes]).cumsum(0),
        rows_Q=torch.arange(len(sizes)),
        passage_hashes_P=torch.tensor(HASHES[rank]),
        known_positive_hashes_QM=torch.tensor(KNOWN[rank]),
        query_hashes_Q=torch.tensor(ASKED[rank]),
        in_batch_negatives=in_batch,
        positive_counts=tuple(DRAWN[rank]),
    )


def one_rank(config: UnifiedConfig, tiles: str, in_batch: bool) -> dict:
    rank, settings = comm.rank(), resolve_settings(config)
    (queries, passages), batch = texts_of(rank), batch_of(rank, in_batch)
    counts = count_over_ranks(queries, passages, batch.query_hashes_Q)
    negatives = find_negatives(batch, config.mask_false_negatives, counts)
    teacher = None
    if config.teacher or config.false_negative_margin_source == "teacher":
        scores_QG = group_rows(taught_of(rank), batch.group_offsets_Q1, batch.group_sizes, 0.0)
        teacher = TeacherGroups(scores_QG, *negatives.group_columns())
    shared = {"negatives": negatives, "settings": settings, "counts": counts, "tiles": tiles}
    distill = settings.distills(0)
    terms = retrieval_loss(queries, passages, **shared, distill=distill, teacher=teacher)
    terms = add_dense_losses(terms, queries, passages, **shared)
    floats = [*queries.floats(), *passages.floats()]
    grads = torch.autograd.grad(terms.total, floats, allow_unused=True)
    return {
        "total": comm.all_reduce_sum(terms.total.detach()) / comm.world_size(),
        "terms": {n: comm.all_reduce_sum(x) / comm.world_size() for n, x in terms.terms.items()},
        "accuracy": {
            n: comm.all_reduce_sum(x.double()) / comm.world_size() for n, x in terms.accuracy.items()
        },
        "grads": [
            gather_rows(torch.zeros_like(x) if grad is None else grad) / comm.world_size()
            for x, grad in zip(floats, grads)
        ],
    }


def every_case() -> list[dict]:
    return [one_rank(*case) for case in CASES]


def lse(values: list[torch.Tensor]) -> torch.Tensor:
    return torch.logsumexp(torch.stack(values), 0)


class WrittenOut:
    """All ranks' queries, one after the other, over plain score matrices."""

    def __init__(self, world_size: int, config: UnifiedConfig, in_batch: bool):
        ranks = range(world_size)
        sides = [texts_of(rank) for rank in ranks]
        self.leaves = [
            join_representations([side[i] for side in sides]).with_floats(
                *(
                    torch.cat(parts).detach().requires_grad_()
                    for parts in zip(*(side[i].floats() for side in sides))
                )
            )
            for i in (0, 1)
        ]
        self.scores = naive_scores(*self.leaves, (1.0, 0.3, 1.0))
        self.config, self.in_batch = config, in_batch
        self.hashes = [h for rank in ranks for h in HASHES[rank]]
        self.sizes = [size for rank in ranks for size in SIZES[rank]]
        self.drawn = [count for rank in ranks for count in DRAWN[rank]]
        self.starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        asked = [a for rank in ranks for a in ASKED[rank]]
        known = [set(row) for rank in ranks for row in KNOWN[rank]]
        self.known = [set().union(*(k for a, k in zip(asked, known) if a == own)) for own in asked]
        self.taught = torch.cat([taught_of(rank) for rank in ranks])

    def positives(self, query: int) -> list[int]:
        return list(range(self.starts[query], self.starts[query] + self.drawn[query]))

    def seen_negatives(self, query: int) -> list[int]:
        own = range(self.starts[query], self.starts[query] + self.sizes[query])
        columns = range(len(self.hashes)) if self.in_batch else own
        positives, found = self.positives(query), []
        margin = self.config.false_negative_margin
        for column in columns:
            if column in positives or self.hashes[column] in self.known[query]:
                continue
            if margin is not None and self.config.false_negative_margin_source == "sum":
                row = self.scores["sum"][query].tolist()
                if row[column] > max(row[p] for p in positives) + margin:
                    continue
            elif margin is not None and column in own:
                row = self.taught.tolist()
                if row[column] > max(row[p] for p in positives) + margin:
                    continue
            found.append(column)
        return found

    def losses_of(self, query: int) -> dict[str, torch.Tensor]:
        positives, negatives = self.positives(query), self.seen_negatives(query)
        seen, group = positives + negatives, range(self.starts[query], self.starts[query] + self.sizes[query])
        own = [c for c in group if c in seen]
        target = torch.softmax(self.taught[own], 0)
        rows: dict[str, torch.Tensor] = {}
        teacher = self.config.teacher
        for name in NAMES:
            s = self.scores[name][query] / TAU
            if teacher != "m3_kd_loss":
                told = [lse([s[p], *(s[n] for n in negatives)]) - s[p] for p in positives]
                rows[name] = torch.stack(told).mean()
            if teacher == "kl_div":
                rows[f"teacher_{name}"] = -(target * torch.log_softmax(s[own], 0)).sum()
            if teacher == "m3_kd_loss":
                order = sorted(own, key=lambda c: (c not in positives, -self.taught[c].item()))
                left, total = list(seen), 0.0
                for column in order:
                    weight = target[own.index(column)]
                    total = total + weight * (lse([s[c] for c in left]) - s[column])
                    left.remove(column)
                rows[f"teacher_{name}"] = total
        if self.config.self_distill:
            goal = torch.softmax(self.scores["sum"][query, seen].detach() / TAU, 0)
            for name in NAMES[:3]:
                log_p = torch.log_softmax(self.scores[name][query, seen] / TAU, 0)
                rows[f"distill_{name}"] = -(goal * log_p).sum()
        return rows

    def backwards(self) -> torch.Tensor:
        """Every drawn positive against the queries that it is not known to answer."""
        losses = []
        for query in range(len(self.sizes)):
            for positive in self.positives(query):
                column = self.scores["dense"][:, positive] / TAU
                others = [q for q, known in enumerate(self.known) if self.hashes[positive] not in known]
                losses.append(lse([column[query], *(column[q] for q in others)]) - column[query])
        return torch.stack(losses).mean()

    def result(self) -> dict:
        rows = [self.losses_of(query) for query in range(len(self.sizes))]
        terms = {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
        total = sum(
            LOSS[n.removeprefix("teacher_")] * x for n, x in terms.items() if not n.startswith("distill")
        )
        total = total / 4
        if self.config.self_distill:
            total = (total + sum(w * terms[f"distill_{name}"] for name, w in DISTILL.items()) / 3) / 2
        if self.config.both_directions and self.in_batch:
            terms["passage_to_query"] = self.backwards()
            total = total + terms["passage_to_query"] / 4
        floats = [x for side in self.leaves for x in side.floats()]
        grads = torch.autograd.grad(total, floats, allow_unused=True)
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(floats, grads)]
        return {"total": total.detach(), "terms": terms, "accuracy": self.accuracy(), "grads": grads}

    def accuracy(self) -> dict[str, float]:
        found = {}
        for name in NAMES:
            shares = []
            for query in range(len(self.sizes)):
                s, negatives = self.scores[name][query].tolist(), self.seen_negatives(query)
                highest = max([-math.inf, *(s[n] for n in negatives)])
                shares += [sum(s[p] > highest for p in self.positives(query)) / self.drawn[query]]
            found[name] = sum(shares) / len(shares)
        return found


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
def test_losses_gradients_and_accuracies_equal_the_loops(world_size):
    results = run_ranks(every_case, world_size)[-1]
    for (config, tiles, in_batch), found in zip(CASES, results, strict=True):
        expected = WrittenOut(world_size, config, in_batch).result()
        case = f"{config.teacher} {config.false_negative_margin_source} tiles {tiles} in batch {in_batch}"
        torch.testing.assert_close(found["total"], expected["total"], rtol=1e-11, atol=1e-13, msg=case)
        assert found["terms"].keys() == expected["terms"].keys(), case
        for name, value in expected["terms"].items():
            torch.testing.assert_close(
                found["terms"][name], value.detach(), rtol=1e-11, atol=1e-13, msg=f"{case}: {name}"
            )
        for name, value in expected["accuracy"].items():
            assert float(found["accuracy"][name]) == pytest.approx(value, abs=1e-6), f"{case}: {name}"
        for ours, theirs in zip(found["grads"], expected["grads"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12, msg=case)


def test_a_second_positive_pulls_and_is_pushed_by_none_of_the_others():
    """InfoNCE with both positives in one denominator would push the weaker one away."""
    logits = torch.tensor([[3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    exists, negatives = torch.ones(1, 2, dtype=torch.bool), torch.tensor([math.log(2)], dtype=torch.float64)
    loss = infonce_rows(logits, exists, negatives).sum()
    worked = (math.log(math.exp(3) + 2) - 3 + math.log(math.exp(1) + 2) - 1) / 2
    assert loss.item() == pytest.approx(worked, rel=1e-14)
    assert (torch.autograd.grad(loss, logits)[0] < 0).all()
    assert hit_rows(logits, exists, torch.tensor([1.0])).tolist() == [0.5]


def test_places_and_rows_of_positives():
    positives = Positives(torch.tensor([0, 4, 6]), (2, 1, 2))
    columns, exists = positives.columns()
    assert columns.tolist() == [[0, 1], [4, 4], [6, 7]]
    assert exists.tolist() == [[True, True], [True, False], [True, True]]
    query, place = positives.rows()
    assert (query.tolist(), place.tolist()) == ([0, 0, 1, 2, 2], [0, 1, 0, 0, 1])
    assert positives.is_positive(3).tolist() == [
        [True, True, False],
        [True, False, False],
        [True, True, False],
    ]


def test_drawn_positives_are_no_negatives_of_rows_that_do_not_know_the_record():
    """Without the record's list the drawn ones are known all the same."""
    batch = replace(batch_of(0, True), known_positive_hashes_QM=None)
    visible = find_negatives(batch, True).visible()
    assert visible[0].tolist() == [True, True, True, True, True, True, False, True]
    assert visible[2].tolist() == [False, True, True, True, True, True, True, True]
