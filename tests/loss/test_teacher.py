"""Teachers with temperatures and weights of their own, against loops over queries and columns, in float64."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, softmax

from megam3.config.objective import UnifiedConfig
from megam3.config.weights import LossWeights, ScoreTemperatures
from megam3.loss.settings import NAMES, resolve_settings
from megam3.loss.unified import unified_loss
from tests.loss.test_unified import (
    GROUPS,
    NUM_PASSAGES,
    POSITIVES,
    _allowed,
    _naive_teacher,
    _scores,
    _teacher,
)

TAUS = {"dense": 0.5, "lexical": 2.0, "multi_vector": 0.7, "sum": 1.3}
LOSSES = {"dense": 1.0, "lexical": 0.1, "multi_vector": 1.0, "sum": 1.0}
TAUGHT = {"dense": 0.0, "lexical": 0.5, "multi_vector": 2.0, "sum": 1.0}


def config(kind: str, **changed) -> UnifiedConfig:
    given = {
        "teacher": kind,
        "temperature": 0.5,
        "temperatures": ScoreTemperatures(lexical=2.0, multi_vector=0.7, sum=1.3),
        "teacher_temperature": 3.0,
        "teacher_weights": {"dense": 0.0, "lexical": 0.5, "multi_vector": 2.0},
    }
    return UnifiedConfig.model_validate({**given, **changed})


def log_softmax_of(values: list[float]) -> list[float]:
    total = math.log(sum(math.exp(x) for x in values))
    return [x - total for x in values]


def written_out(scores, allowed, kind: str, keeps: bool, student: float | None, distill: bool) -> float:
    """Every term of one query after the other; test_unified's loop works at its own TAU = 0.5."""
    total = 0.0
    taught = _teacher().scores_QG / 3.0
    for query, positive in enumerate(POSITIVES.tolist()):
        seen = [c for c in range(NUM_PASSAGES) if allowed[query, c]]
        row = {name: [x / TAUS[name] for x in scores[name][query].tolist()] for name in NAMES}
        logs = {name: dict(zip(seen, log_softmax_of([row[name][c] for c in seen]))) for name in NAMES}
        group = GROUPS[query]
        first = 0.0
        for name in NAMES:
            first += LOSSES[name] * -logs[name][positive] * keeps
            # the loop divides by 0.5: hand it what becomes the logit
            tau = student or TAUS[name]
            logits = [x / tau * 0.5 for x in scores[name][query].tolist()]
            teaching = taught[query, : len(group)].tolist()
            first += TAUGHT[name] * _naive_teacher(logits, group, seen, teaching, kind)
        target = [math.exp(logs["sum"][c]) for c in seen]
        second = sum(
            weight * -sum(t * logs[name][c] for t, c in zip(target, seen)) / 3
            for name, weight in (("dense", 1.0), ("lexical", 0.1), ("multi_vector", 1.0))
        )
        total += (first / 4 + second) / 2 if distill else first / 4
    return total / 3


@pytest.mark.parametrize("distill", [True, False])
@pytest.mark.parametrize(
    ("kind", "keeps", "student"),
    [
        ("kl_div", None, None),
        ("kl_div", None, 1.7),
        ("kl_div", False, None),
        ("m3_kd_loss", None, None),
        ("m3_kd_loss", True, None),
    ],
)
def test_temperatures_and_weights_equal_the_loop(kind, keeps, student, distill):
    settings = resolve_settings(
        config(kind, teacher_keeps_infonce=keeps, teacher_student_temperature=student)
    )
    scores, allowed = _scores(), _allowed()
    loss = unified_loss(scores, POSITIVES, allowed, settings, 1 / 3, distill, _teacher()).total
    has_infonce = keeps if keeps is not None else kind == "kl_div"
    expected = written_out(scores, allowed, kind, has_infonce, student, distill)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["kl_div", "m3_kd_loss"])
def test_gradients_equal_finite_differences(kind):
    settings = resolve_settings(config(kind, teacher_keeps_infonce=True))
    scores, allowed = _scores(), _allowed()
    heads = [scores[name] for name in NAMES[:3]]

    def total(*values):
        named = dict(zip(NAMES, values)) | {"sum": values[0] + 0.3 * values[1] + values[2]}
        return unified_loss(named, POSITIVES, allowed, settings, 1 / 3, False, _teacher()).total

    assert torch.autograd.gradcheck(total, heads)


def test_the_defaults_are_the_formulas_of_flagembedding():
    """Its `kl_div`: cross-entropy over all columns, plus −mean Σ softmax(raw teacher scores) ·
    log softmax(s / τ) over the own group, with the loss's weight on both."""
    scores = torch.randn(2, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    positives, everything = torch.tensor([0, 3]), torch.ones(2, 6, dtype=torch.bool)
    taught = torch.tensor([[1.0, 0.5, -1.0], [2.0, 2.5, 0.0]], dtype=torch.float64)
    columns = torch.tensor([[0, 1, 2], [3, 4, 5]])
    from_records = type(_teacher())(taught, columns, torch.ones(2, 3, dtype=torch.bool))
    settings = resolve_settings(UnifiedConfig(heads=["dense"], teacher="kl_div"))
    ours = unified_loss({"dense": scores}, positives, everything, settings, 1 / 2, False, from_records)
    logits = scores / 0.02
    own = torch.stack([logits[0, :3], logits[1, 3:]])
    kl = -(softmax(taught, -1) * torch.log_softmax(own, -1)).sum(-1).mean()
    torch.testing.assert_close(ours.total, cross_entropy(logits, positives) + kl, rtol=1e-12, atol=0)


def test_a_teacher_alone_trains_a_score_without_infonce():
    section = config("kl_div", loss_weights=LossWeights(dense=1.0, lexical=0.0, multi_vector=0.0, sum=0.0))
    settings = resolve_settings(section)
    assert settings.trained == ("dense",)
    assert settings.taught == ("lexical", "multi_vector")
    terms = unified_loss(_scores(), POSITIVES, _allowed(), settings, 1 / 3, False, _teacher()).terms
    assert list(terms) == ["dense", "teacher_lexical", "teacher_multi_vector"]
    # records without teacher scores still train what has an InfoNCE
    assert list(unified_loss(_scores(), POSITIVES, _allowed(), settings, 1 / 3, False).terms) == ["dense"]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"teacher_weights": {"dense": 1.0}}, "objective.teacher_weights"),
        ({"teacher_keeps_infonce": True}, "objective.teacher_keeps_infonce"),
        ({"teacher_student_temperature": 1.0}, "objective.teacher_student_temperature"),
        (
            {"teacher": "m3_kd_loss", "teacher_student_temperature": 1.0},
            "objective.teacher_student_temperature",
        ),
        (
            {
                "teacher": "kl_div",
                "teacher_weights": {"dense": 0, "lexical": 0, "multi_vector": 0, "sum": 0},
            },
            "objective.teacher_weights",
        ),
    ],
)
def test_settings_that_nobody_reads_are_refused(given, field):
    (problem,) = UnifiedConfig.model_validate(given).problems()
    assert str(problem).startswith(field)


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        (None, "says how a teacher is learned from, and objective.teacher names none; set objective.teacher"),
        (
            "m3_kd_loss",
            "have the score's own temperature; use teacher: kl_div, or set objective.temperatures",
        ),
    ],
)
def test_a_temperature_that_nobody_reads_says_what_to_do(teacher, said):
    (problem,) = UnifiedConfig(teacher=teacher, teacher_student_temperature=1.0).problems()
    assert said in str(problem)


def test_what_a_run_folder_records_reads_back_as_the_same_numbers():
    section = config("kl_div")
    again = UnifiedConfig.model_validate(section.model_dump())
    assert resolve_settings(again) == resolve_settings(section)
    assert resolve_settings(section).teacher_weights == LossWeights(**TAUGHT)
