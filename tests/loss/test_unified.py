"""The unified loss against loops over queries and columns, in float64."""

import math

import pytest
import torch

from megam3.config.objective import UnifiedConfig
from megam3.config.weights import HeadWeights, LossWeights
from megam3.loss.distillation import TeacherGroups
from megam3.loss.settings import NAMES, resolve_settings
from megam3.loss.unified import unified_loss

HEADS = NAMES[:3]
GROUPS = [[0, 1, 2], [3, 4], [5, 6, 7]]
NUM_PASSAGES = 8
POSITIVES = torch.tensor([0, 3, 5])
TAU = 0.5


def _scores(seed=0, sums=(1.0, 0.3, 1.0)):
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.randn(3, NUM_PASSAGES, generator=generator, dtype=torch.float64).requires_grad_()
        for name in HEADS
    }
    return {**scores, "sum": sum(weight * score for weight, score in zip(sums, scores.values()))}


def _allowed(in_batch=True, seed=1):
    if not in_batch:
        return torch.tensor([[column in group for column in range(NUM_PASSAGES)] for group in GROUPS])
    allowed = torch.rand(3, NUM_PASSAGES, generator=torch.Generator().manual_seed(seed)) > 0.2
    return allowed.scatter(1, POSITIVES[:, None], True)


def _log_softmax(row, columns):
    """{column: log probability} over these columns only."""
    total = math.log(sum(math.exp(row[c] / TAU) for c in columns))
    return {c: row[c] / TAU - total for c in columns}


def _teacher():
    columns = torch.tensor([[0, 1, 2], [3, 4, 4], [5, 6, 7]])
    exists = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    return TeacherGroups(
        torch.tensor([[1.0, 0.2, 1.5], [0.5, 0.1, 9.0], [2.0, 1.0, 0.3]], dtype=torch.float64),
        columns,
        exists,
    )


def _naive_teacher(row, columns, allowed, scores, kind):
    """One query, one score; `columns` positive first."""
    seen = [(c, s) for c, s in zip(columns, scores) if c in allowed]
    norm = sum(math.exp(s) for _, s in seen)
    target = {c: math.exp(s) / norm for c, s in seen}
    if kind == "kl_div":
        own = _log_softmax(row, [c for c, _ in seen])
        return -sum(target[c] * own[c] for c in own)
    order = [seen[0][0], *(c for c, _ in sorted(seen[1:], key=lambda pair: -pair[1]))]
    visible, total = list(allowed), 0.0
    for column in order:
        total -= target[column] * _log_softmax(row, visible)[column]
        visible.remove(column)
    return total


def _naive(scores, allowed, losses, divisor, distills, teacher_kind=None):
    rows = {name: matrix.tolist() for name, matrix in scores.items()}
    terms, total = {}, 0.0
    for query, positive in enumerate(POSITIVES.tolist()):
        seen = [c for c in range(NUM_PASSAGES) if allowed[query, c]]
        logs = {name: _log_softmax(rows[name][query], seen) for name in NAMES}
        taught = _teacher()
        first = distilled = 0.0
        for name in NAMES:
            values = {}
            if teacher_kind != "m3_kd_loss":
                values[name] = -logs[name][positive]
            if teacher_kind:
                group = GROUPS[query]
                values[f"teacher_{name}"] = _naive_teacher(
                    rows[name][query],
                    group,
                    seen,
                    taught.scores_QG[query, : len(group)].tolist(),
                    teacher_kind,
                )
            first += losses[name] * sum(values.values()) / divisor
            if distills and name != "sum":
                values[f"distill_{name}"] = -sum(math.exp(logs["sum"][c]) * logs[name][c] for c in seen)
                distilled += distills[name] * values[f"distill_{name}"] / 3
            for key, value in values.items():
                terms[key] = terms.get(key, 0.0) + value / 3
        total += ((first + distilled) / 2 if distills else first) / 3
    return total, terms


M3_LOSSES = {"dense": 1.0, "lexical": 0.1, "multi_vector": 1.0, "sum": 1.0}
M3_DISTILLS = {"dense": 1.0, "lexical": 0.1, "multi_vector": 1.0}


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("distill", [True, False])
@pytest.mark.parametrize("teacher", [None, "kl_div", "m3_kd_loss"])
def test_equals_the_loop(in_batch, distill, teacher):
    scores, allowed = _scores(), _allowed(in_batch)
    settings = resolve_settings(UnifiedConfig(temperature=TAU, teacher=teacher))
    terms = unified_loss(
        scores, POSITIVES, allowed, settings, 1 / 3, distill, _teacher() if teacher else None
    )
    total, named = _naive(scores, allowed, M3_LOSSES, 4, M3_DISTILLS if distill else None, teacher)
    assert terms.total.item() == pytest.approx(total, rel=1e-12)
    assert {name: value.item() for name, value in terms.terms.items()} == pytest.approx(named, rel=1e-12)


@pytest.mark.parametrize("teacher", [None, "kl_div", "m3_kd_loss"])
def test_gradients_equal_finite_differences(teacher):
    settings = resolve_settings(UnifiedConfig(temperature=TAU, teacher=teacher))
    allowed, frozen = _allowed(), _scores()
    taught = _teacher() if teacher else None

    def total(*heads):
        # the distillation target carries no gradient: hold it still while differences are taken
        named = dict(zip(HEADS, heads))
        first = unified_loss(
            {**named, "sum": heads[0] + 0.3 * heads[1] + heads[2]},
            POSITIVES,
            allowed,
            settings,
            1 / 3,
            False,
            taught,
        ).total
        return (
            first
            + unified_loss(
                {**named, "sum": frozen["sum"].detach()}, POSITIVES, allowed, settings, 1 / 3, True, taught
            ).total
        )

    assert torch.autograd.gradcheck(total, [frozen[name] for name in HEADS])


def test_masked_columns_receive_no_gradient_and_never_nan():
    scores, allowed = _scores(), _allowed()
    settings = resolve_settings(UnifiedConfig(temperature=0.02, teacher="m3_kd_loss"))
    unified_loss(scores, POSITIVES, allowed, settings, 1 / 3, True, _teacher()).total.backward()
    for name in HEADS:
        assert torch.isfinite(scores[name].grad).all()
        assert not scores[name].grad[~allowed].any()


def test_alone_with_its_positive_the_loss_is_zero():
    allowed = torch.zeros(3, NUM_PASSAGES, dtype=torch.bool).scatter(1, POSITIVES[:, None], True)
    for teacher in (None, "kl_div", "m3_kd_loss"):
        settings = resolve_settings(UnifiedConfig(teacher=teacher))
        terms = unified_loss(
            _scores(), POSITIVES, allowed, settings, 1.0, True, _teacher() if teacher else None
        )
        assert terms.total.item() == 0.0
        assert all(value.item() == 3.0 for value in terms.accuracy.values())


def test_order_of_negatives_in_a_record_does_not_matter():
    taught, settings = _teacher(), resolve_settings(UnifiedConfig(teacher="m3_kd_loss"))
    swap = torch.tensor([0, 2, 1])
    swapped = TeacherGroups(taught.scores_QG[:, swap], taught.columns_QG[:, swap], taught.exists_QG[:, swap])
    everything = torch.ones(3, NUM_PASSAGES, dtype=torch.bool)
    values = [
        unified_loss(_scores(), POSITIVES, everything, settings, 1.0, False, each).total.item()
        for each in (taught, swapped)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-13)


def test_accuracy_counts_masked_rows_rightly():
    scores = {name: torch.zeros(2, 3) for name in NAMES}
    scores["dense"] = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    allowed = torch.tensor([[True, False, True], [True, True, True]])
    settings = resolve_settings(UnifiedConfig())
    terms = unified_loss(scores, torch.tensor([0, 1]), allowed, settings, 0.5, False)
    assert terms.accuracy["dense"].item() == 0.5


def test_margin_rule_by_the_sum_and_by_the_teacher():
    scores = _scores()
    above = [
        [
            scores["sum"][query, column] > scores["sum"][query, POSITIVES[query]] + 0.5
            for column in range(NUM_PASSAGES)
        ]
        for query in range(3)
    ]
    mask = torch.tensor(above)
    everything, plain = torch.ones(3, NUM_PASSAGES, dtype=torch.bool), resolve_settings(UnifiedConfig())
    with_margin = resolve_settings(UnifiedConfig(false_negative_margin=0.5))
    ours = unified_loss(scores, POSITIVES, everything, with_margin, 1.0, True).total
    assert ours.item() == unified_loss(scores, POSITIVES, ~mask, plain, 1.0, True).total.item()

    by_teacher = resolve_settings(
        UnifiedConfig(false_negative_margin=0.4, false_negative_margin_source="teacher")
    )
    expected = everything.clone()
    expected[0, 2] = False  # 1.5 > 1.0 + 0.4; the 9.0 of group 1 belongs to no passage
    ours = unified_loss(scores, POSITIVES, everything, by_teacher, 1.0, True, _teacher()).total
    assert ours.item() == unified_loss(scores, POSITIVES, expected, plain, 1.0, True).total.item()
    ours = unified_loss(scores, POSITIVES, everything, by_teacher, 1.0, True).total
    assert ours.item() == unified_loss(scores, POSITIVES, everything, plain, 1.0, True).total.item()


def test_presets():
    m3, v1 = resolve_settings(UnifiedConfig()), resolve_settings(UnifiedConfig(preset="m3_v1"))
    joint = resolve_settings(
        UnifiedConfig(preset="joint", loss_weights=LossWeights(dense=2.0, lexical=0.0, multi_vector=0.5))
    )
    assert (m3.loss_weights.lexical, m3.sum_weights.lexical, m3.distill_weights.lexical, m3.loss_divisor) == (
        0.1,
        0.3,
        0.1,
        4,
    )
    assert (v1.loss_weights.lexical, v1.sum_weights.lexical, v1.distill_weights.lexical, v1.loss_divisor) == (
        1.0,
        1.0,
        1.0,
        4,
    )
    assert (joint.sum_weights, joint.distill_weights, joint.loss_weights.sum, joint.loss_divisor) == (
        None,
        None,
        0.0,
        1.0,
    )
    assert joint.heads == ("dense", "multi_vector")
    assert m3.heads == HEADS

    scores = _scores()
    del scores["sum"], scores["lexical"]
    terms = unified_loss(scores, POSITIVES, _allowed(), joint, 1.0, False)
    assert list(terms.terms) == ["dense", "multi_vector"]
    assert terms.total.item() == pytest.approx(
        2 * terms.terms["dense"].item() + 0.5 * terms.terms["multi_vector"].item()
    )


def test_the_recipes_own_weights_win():
    config = UnifiedConfig(
        sum_weights=HeadWeights(dense=1, lexical=2, multi_vector=3),
        loss_weights=LossWeights(sum=0.0),
        distill_weights=HeadWeights(dense=0.0),
        self_distill_start_step=7,
    )
    settings = resolve_settings(config)
    assert (settings.sum_weights.lexical, settings.loss_weights.lexical, settings.distill_weights.dense) == (
        2.0,
        0.1,  # not given: the preset's
        0.0,
    )
    assert [settings.distills(step) for step in (0, 6, 7)] == [False, False, True]
    assert not resolve_settings(UnifiedConfig(self_distill=False)).distills(100)
    terms = unified_loss(_scores(), POSITIVES, _allowed(), settings, 1.0, True)
    assert [name for name in terms.terms if "distill" in name] == ["distill_lexical", "distill_multi_vector"]
    assert "sum" not in terms.terms
    margin_only = resolve_settings(
        UnifiedConfig(preset="joint", false_negative_margin=1.0, loss_weights=LossWeights(lexical=0.0))
    )
    assert margin_only.sum_weights == HeadWeights(dense=1, lexical=0, multi_vector=1)


@pytest.mark.parametrize(
    ("preset", "lexical", "distilled"), [("m3", 0.1, 0.1), ("m3_v1", 1.0, 1.0), ("joint", 1.0, None)]
)
def test_one_overridden_weight_leaves_the_others_to_the_preset(
    preset: str, lexical: float, distilled: float | None
) -> None:
    section = {"preset": preset, "loss_weights": {"dense": 3.0}, "distill_weights": {"dense": 0.5}}
    for config in (
        UnifiedConfig.model_validate(section),
        UnifiedConfig(
            preset=preset, loss_weights=LossWeights(dense=3.0), distill_weights=HeadWeights(dense=0.5)
        ),
    ):
        settings = resolve_settings(config)
        assert (settings.loss_weights.dense, settings.loss_weights.lexical) == (3.0, lexical)
        assert (settings.distill_weights and settings.distill_weights.lexical) == distilled
        # what a run folder records reads back as the same numbers
        assert resolve_settings(UnifiedConfig.model_validate(config.model_dump())) == settings


def test_a_rank_without_queries_adds_zero():
    scores = {name: torch.zeros(0, 5, requires_grad=True) for name in NAMES}
    nothing = torch.zeros(0, dtype=torch.int64)
    for columns in (5, 0):
        scores = {name: torch.zeros(0, columns, requires_grad=True) for name in NAMES}
        terms = unified_loss(
            scores,
            nothing,
            torch.zeros(0, columns, dtype=torch.bool),
            resolve_settings(UnifiedConfig()),
            2.0,
            True,
        )
        assert terms.total.item() == 0.0
        assert list(terms.accuracy) == list(NAMES)
        terms.total.backward()
